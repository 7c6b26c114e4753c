"""Read the fields of a Protocol Buffers message, without its schema."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_VARINT, _64_BITS, _BYTES, _32_BITS = 0, 1, 2, 5
_LONGEST_VARINT = 10  # bytes


def message_fields(data: memoryview) -> Iterator[tuple[int, int | float | memoryview]]:
    r"""Yield the fields of a message.

    Args:
      data: The message.

    Yields:
      The number of each field and its value: an integer, a float of 32 bits, or the bytes of a
      string or an inner message. Fields of 64 bits are left out.

    Raises:
      ValueError: The bytes are not a message.

    Example:
      >>> [(number, bytes(value)) for number, value in message_fields(memoryview(b"\x0a\x02hi"))]
      [(1, b'hi')]
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("a field with the number 0")
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {_64_BITS: 8, _32_BITS: 4}.get(kind)
        if kind == _BYTES:
            size, at = _varint(data, at)
        if size is None:
            raise ValueError(f"field {number} of the unknown kind {kind}")
        part, at = data[at : at + size], at + size
        if at > len(data):
            raise ValueError(f"field {number} ends {at - len(data)} bytes behind the message")
        if kind == _BYTES:
            yield number, part
        elif kind == _32_BITS:
            yield number, struct.unpack("<f", part)[0]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the integer at a place, and the place behind it."""
    value = 0
    for count, byte in enumerate(data[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, at + count + 1
    raise ValueError(f"an integer without an end at byte {at}")
