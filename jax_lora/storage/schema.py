"""Describe the fields of an untrusted document, and list the values that do not fit.

A `Kind` describes a value. `problems` returns a line for each value that does not fit, with its
field as a dotted path, the value, and what was expected.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_LONGEST_VALUE = 80  # characters in a message


class _Absent:
    """The value of a required field that is absent; null would fit some kinds."""

    def __repr__(self) -> str:
        return "missing"


_ABSENT = _Absent()


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value may be.

    Args:
      expected: A description, for messages.
      fits: Tells whether a value fits, not counting its parts.
      parts: Returns the parts of a value that fits: name, value, and kind of each.
    """

    expected: str
    fits: Callable[[Any], bool]
    parts: Callable[[Any], Iterator[tuple[str, Any, Kind]]] = lambda value: iter(())


def problems(value: Any, kind: Kind, field: str = "") -> Iterator[str]:
    """Yield a line for each value of a document that does not fit; `field` is its dotted path.

    Example:
      >>> list(problems({"a": {"b": "x"}}, fields({"a": fields({"b": INTEGER})})))
      ["a.b = 'x': expected an integer"]
    """
    if not kind.fits(value):
        yield f"{field or 'the document'} = {shown(value)}: expected {kind.expected}"
        return
    for name, part, inner in kind.parts(value):
        yield from problems(part, inner, f"{field}.{name}" if field else name)


def shown(value: Any) -> str:
    """Return a value as a message shows it, shortened.

    Example:
      >>> shown("a" * 100)[-5:]
      'aa...'
    """
    if isinstance(value, (str, bytes)):
        value = value[: _LONGEST_VALUE + 1]
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def is_integer(value: Any) -> bool:
    """Tell whether a value is an integer and not a Boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Tell whether a value is a number that a float can represent, and not a Boolean."""
    if is_integer(value):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


ANYTHING = Kind("anything", lambda value: True)
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
INTEGER = Kind("an integer", lambda value: is_integer(value) and abs(value) < 2**63)
NUMBER = Kind("a finite number", is_number)
TEXT = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))


def integer(least: int, most: int) -> Kind:
    """Describe an integer in a range, both ends included."""
    fits = lambda value: is_integer(value) and least <= value <= most  # noqa: E731
    return Kind(f"an integer from {least} to {most}", fits)


def choice(*values: Any) -> Kind:
    """Describe one of several values, with its type: 1 is not true."""
    expected = " or ".join("null" if each is None else repr(each) for each in values)
    return Kind(expected, lambda v: any(type(v) is type(each) and v == each for each in values))


def optional(kind: Kind) -> Kind:
    """Describe a value that may be null."""
    return either(kind, Kind("null", lambda value: value is None))


def either(*kinds: Kind) -> Kind:
    """Describe a value of one of several kinds, the first that fits."""

    def parts(value: Any) -> Iterator[tuple[str, Any, Kind]]:
        return next(kind for kind in kinds if kind.fits(value)).parts(value)

    expected = " or ".join(kind.expected for kind in kinds)
    return Kind(expected, lambda value: any(kind.fits(value) for kind in kinds), parts)


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """Describe a list, of a fixed length if one is given."""

    def fits(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and length in (None, len(value))

    def parts(value: Any) -> Iterator[tuple[str, Any, Kind]]:
        return ((str(index), each, kind) for index, each in enumerate(value))

    size = "" if length is None else f"{length} "
    return Kind(f"a list of {size}({kind.expected})", fits, parts)


def object_of(kind: Kind) -> Kind:
    """Describe an object whose values are all of one kind."""

    def parts(value: Any) -> Iterator[tuple[str, Any, Kind]]:
        return ((str(name), each, kind) for name, each in value.items())

    return Kind(f"an object of ({kind.expected})", OBJECT.fits, parts)


def fields(kinds: Mapping[str, Kind], required: tuple[str, ...] = ()) -> Kind:
    """Describe an object by the kinds of its fields, of which all may be absent but the required.

    Other fields are ignored.
    """

    def parts(value: Any) -> Iterator[tuple[str, Any, Kind]]:
        for name in required:
            if name not in value:
                expected = kinds[name].expected if name in kinds else "a value"
                yield name, _ABSENT, Kind(expected, lambda value: False)
        for name, kind in kinds.items():
            if name in value:
                yield name, value[name], kind

    return Kind("an object", OBJECT.fits, parts)


def record(kinds: Mapping[str, Kind], optional: tuple[str, ...] = ()) -> Kind:
    """Describe an object by its fields, of which all but the optional are required."""
    return fields(kinds, tuple(name for name in kinds if name not in optional))


def of_annotation(annotation: Any) -> Kind:
    """Describe a value by a type annotation: of a scalar, a tuple, a mapping, or a union.

    Example:
      >>> of_annotation(tuple[int, ...] | None).expected
      'a list of (an integer) or null'
    """
    scalars = {bool: BOOLEAN, int: INTEGER, float: NUMBER, str: TEXT}
    if annotation in scalars:
        return scalars[annotation]
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = [of_annotation(each) for each in inner if each is not type(None)]
        kind = either(*kinds) if kinds[1:] else kinds[0]
        return optional(kind) if type(None) in inner else kind
    if origin is tuple:
        return list_of(of_annotation(inner[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return OBJECT
    return ANYTHING
