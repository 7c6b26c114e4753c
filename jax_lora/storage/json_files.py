"""Read untrusted JSON strictly, with limits and one error type."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jax_lora.errors import LoraError
from jax_lora.storage.limits import limit, limit_hint

_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LONGEST_CAUSE = 200  # characters


def read_json(path: Path, error: type[LoraError], size: str = "json_bytes") -> dict[str, Any]:
    """Read a JSON object from a file; `size` is the name of the limit on its size.

    Raises:
      LoraError: An `error`, if the file is missing, too large, nested too deeply, or not a JSON
        object in UTF-8, or has a duplicate key or a number that is not finite.
    """
    return parse_object(read_limited(path, error, size), path, error)


def read_limited(path: Path, error: type[LoraError], size: str) -> bytes:
    """Read a file, unless it is larger than the limit of the name `size`.

    Raises:
      LoraError: An `error`, if the file cannot be read or is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit(size) + 1)  # bounded even if the reported file size is wrong
    except (OSError, ValueError) as cause:
        raise refusal(path, error, cause) from cause
    if len(data) > limit(size):
        got = f"more than {limit(size):,} bytes"
        raise error(path, got=got, expected="a smaller file", fix=limit_hint(size))
    return data


def parse_object(data: bytes, path: Path, error: type[LoraError]) -> dict[str, Any]:
    """Parse the contents of a file as a JSON object; its path is for messages.

    Raises:
      LoraError: An `error`, as for `read_json`.
    """
    try:
        value = parse_json(data.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} instead of an object")
    except (ValueError, RecursionError) as cause:
        raise refusal(path, error, cause) from cause
    return value


def refusal(path: Path, error: type[LoraError], cause: Exception) -> LoraError:
    """Return the exception for a file that is missing or is not JSON."""
    fix = "Check the path, and that the file is complete."
    if isinstance(cause, TooDeepError):
        fix = limit_hint("json_depth")
    kind = "" if isinstance(cause, OSError) else "broken JSON: "
    got = f"{kind}{type(cause).__name__}: {str(cause)[:_LONGEST_CAUSE]}"
    return error(path, got=got, expected="a JSON object", fix=fix)


class TooDeepError(ValueError):
    """A text is nested more deeply than the limit `json_depth`."""


def parse_json(text: str) -> Any:
    """Parse JSON strictly.

    Raises:
      ValueError: The text is not JSON, is nested too deeply, or has a duplicate key, a number that
        is not finite, an integer of thousands of digits, or half of a surrogate pair.

    Example:
      >>> parse_json('{"a": [1, 2.5]}')
      {'a': [1, 2.5]}
    """
    check_depth(text)
    value = json.loads(
        text,
        object_pairs_hook=unique_keys,
        parse_constant=_refuse_constant,
        parse_float=_finite,
    )
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    return value


def check_depth(text: str) -> None:
    """Check how deeply a JSON text is nested, without parsing it.

    Raises:
      TooDeepError: The depth is above the limit `json_depth`.
    """
    most = limit("json_depth")
    if text.count("[") + text.count("{") <= most:
        return
    brackets = _STRING.sub("", text).encode("utf-8", "replace").translate(None, _NOT_BRACKETS)
    marks = np.frombuffer(brackets, np.uint8)
    opening = (marks == ord("[")) | (marks == ord("{"))
    depth = np.cumsum(np.where(opening, np.int8(1), np.int8(-1)), dtype=np.int64)
    if depth.size and depth.max() > most:
        raise TooDeepError(f"nested more than {most} levels deep")


def unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values, as an `object_pairs_hook` of `json.loads`.

    Raises:
      ValueError: A key occurs twice.
    """
    result = dict(items)
    if len(result) != len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in result if keys.count(key) > 1)
        raise ValueError(f"a duplicate key {twice[:80]!r}")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"the value {name}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:80]}, which is too large")
    return value


def json_checksum(value: Any) -> str:
    """Hash a JSON value to 32 hexadecimal digits, independent of the order of keys.

    Example:
      >>> json_checksum({"a": 1, "b": 2}) == json_checksum({"b": 2, "a": 1})
      True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Add the checksum of an object to it, as the field `seal`."""
    return values | {"seal": json_checksum(values)}


def is_sealed(values: dict[str, Any]) -> bool:
    """Tell whether an object is one that `sealed` returned, unchanged."""
    content = {key: value for key, value in values.items() if key != "seal"}
    return values.get("seal") == json_checksum(content)
