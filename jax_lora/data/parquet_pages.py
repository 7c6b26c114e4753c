"""Measure a Parquet file by the headers of its pages, before anything is decompressed.

The footer states sizes as well, but a reader allocates what the pages state. A page header is a
Thrift structure in the compact protocol, of which only the integers are needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_SIZE, _STORED = 2, 3  # fields of a page header: bytes of the page, expanded and as stored
_DATA_HEADERS = (5, 8)  # fields of a page header: data pages of version 1 and 2
_NUM_VALUES = 1  # field of both
_DEEPEST = 8  # nested structures in a page header


class PageTotals(NamedTuple):
    """Sums over pages.

    Attributes:
      size: Bytes of the expanded pages.
      values: Values in data pages, nulls included.
      listed: Those of them that are in lists.
    """

    size: int
    values: int
    listed: int


def page_totals(content: bytes, metadata: Any) -> PageTotals:
    """Add up the pages of all columns of a file, from its content and its `FileMetaData`.

    Raises:
      ValueError: A page header is damaged, or a page is not where the footer places it.
    """
    size = values = listed = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        for number in range(group.num_columns):
            column = group.column(number)
            pages, at = _pages(column, content), 0
            while at < len(pages):
                header, at = _structure(pages, at)
                at += _integer(header, _STORED)
                size += _integer(header, _SIZE)
                inner = next((header[each] for each in _DATA_HEADERS if each in header), {})
                found = _integer(inner, _NUM_VALUES) if inner else 0
                values += found
                listed += found if metadata.schema.column(number).max_repetition_level else 0
    return PageTotals(size, values, listed)


def _pages(column: Any, content: bytes) -> memoryview:
    offsets = [column.data_page_offset]
    if column.has_dictionary_page and column.dictionary_page_offset:
        offsets.append(column.dictionary_page_offset)
    start = min(offsets)
    end = start + column.total_compressed_size
    if not 0 <= start <= end <= len(content):
        raise ValueError(f"column {column.path_in_schema!r:.80} is outside the file")
    return memoryview(content)[start:end]


def _integer(structure: Any, field: int) -> int:
    value = structure.get(field) if isinstance(structure, dict) else None
    if not isinstance(value, int) or value < 0:
        raise ValueError("a damaged page header")
    return value


def _structure(data: memoryview, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Read integers and structures by field number, and the place behind; skip other values."""
    found: dict[int, Any] = {}
    field = 0
    while True:
        head, at = _byte(data, at)
        if head == 0:
            return found, at
        if head >> 4:
            field += head >> 4
        else:
            field, at = _zigzag(data, at)
        found[field], at = _value(data, at, head & 15, depth)


def _value(data: memoryview, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise ValueError("a damaged page header")
    match kind:
        case 1 | 2:  # a Boolean, which is in the kind
            return None, at
        case 3:
            return None, _within(data, at + 1)
        case 4 | 5 | 6:
            return _zigzag(data, at)
        case 7:
            return None, _within(data, at + 8)
        case 8:
            length, at = _varint(data, at)
            return None, _within(data, at + length)
        case 9 | 10:
            return None, _end_of_list(data, at, depth)
        case 12:
            return _structure(data, at, depth + 1)
    raise ValueError("a damaged page header")


def _end_of_list(data: memoryview, at: int, depth: int) -> int:
    head, at = _byte(data, at)
    length, kind = head >> 4, head & 15
    if length == 15:
        length, at = _varint(data, at)
    for _ in range(length):
        # In a list, a Boolean takes a byte.
        at = _within(data, at + 1) if kind in (1, 2) else _value(data, at, kind, depth + 1)[1]
    return at


def _zigzag(data: memoryview, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        part, at = _byte(data, at)
        value |= (part & 127) << shift
        if part < 128:
            return value, at
    raise ValueError("a damaged page header")


def _byte(data: memoryview, at: int) -> tuple[int, int]:
    return data[_within(data, at + 1) - 1], at + 1


def _within(data: memoryview, at: int) -> int:
    if at > len(data):
        raise ValueError("a page header that is cut off")
    return at
