"""Change bytes and JSON structure at random, toward what readers get wrong."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**40,
    2**63,
    10**9,
    10**400,
    0.5,
    -2.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\ud800",
    "../x",
    "a" * 5000,
    "(a+)+$",
    [],
    [None],
    [[]],
    ["x"],
    [1, 2],
    [[1, 2], [3]],
    {},
    {"a": 1},
    {"": None},
    {"type": "x"},
    {"Regex": "("},
)
TOKENS = (
    b"null",
    b"true",
    b"[" * 200,
    b'{"a":' * 200,
    b"9" * 5000,
    b"1e999",
    b"-",
    b'"\\ud800"',
    b"NaN",
    b"\xff",
    b"\xed\xa0\x80",
    b"\0",
    b"\x1b[2J",
    b"\r\n",
    b"{}",
    b"[]",
    b",",
    b'"',
    b"\\",
    b": ",
    b"- ",
    b"&a ",
    b"*a",
    b"<<: *a\n",
    b"!!int ",
    b"!!timestamp x",
    b"!!python/object:os.system ",
    b"? ",
    b"0x" + b"f" * 30,
    b"1:1:1",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
)


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Change bytes in one to four places."""
    for _ in range(random.randint(1, 4)):
        data = random.choice(_BYTE_CHANGES)(random, data)
    return data


def _flip(random: Random, data: bytes) -> bytes:
    if not data:
        return b"x"
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


def _replace(random: Random, data: bytes) -> bytes:
    start = random.randint(0, len(data))
    return data[:start] + random.choice(TOKENS) + data[start + random.randint(0, 8) :]


def _delete(random: Random, data: bytes) -> bytes:
    start = random.randint(0, len(data))
    return data[:start] + data[start + random.choice((1, 4, 64)) :]


def _repeat(random: Random, data: bytes) -> bytes:
    start = random.randint(0, len(data))
    part = data[start : start + random.choice((1, 8, 64))]
    return data[:start] + part * random.choice((2, 3, 50)) + data[start:]


def _cut(random: Random, data: bytes) -> bytes:
    return data[: random.randint(0, len(data))]


_BYTE_CHANGES: tuple[Callable[[Random, bytes], bytes], ...] = (
    _flip,
    _flip,
    _replace,
    _replace,
    _delete,
    _repeat,
    _cut,
)


def mutate_json(random: Random, data: bytes) -> bytes:
    """Change one or two values of a JSON document; bytes, if it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(random, data)
    for _ in range(random.randint(1, 2)):
        value = _change(random, value)
    try:
        return json.dumps(value).encode()
    except ValueError:  # an integer of too many digits
        return data


def _change(random: Random, value: Any) -> Any:
    """Descend at random, and change the value at the end."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = random.choice(keys)
        how = random.random()
        if how < 0.08:
            return _without(value, key)
        if how < 0.12 and isinstance(value, dict):
            return {**_without(value, key), random.choice(("", "x", str(key) + "s")): value[key]}
        if how < 0.16 and isinstance(value, list):
            return [*value, value[key]]
        changed = _change(random, value[key])
        if isinstance(value, dict):
            return {**value, key: changed}
        return [*value[:key], changed, *value[key + 1 :]]
    if isinstance(value, dict) and random.random() < 0.2:
        return {**value, random.choice(("x", "type", "a.b")): random.choice(VALUES)}
    return random.choice(VALUES)


def _without(value: Any, key: Any) -> Any:
    if isinstance(value, dict):
        return {name: each for name, each in value.items() if name != key}
    return [*value[:key], *value[key + 1 :]]
