"""Packing: several documents in one row, so that nearly nothing of it is padding."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Put documents into as few rows as is easily done: the longest first, where least is left.

    Args:
      lengths: Tokens of each document, none longer than a row.
      room: Tokens of a row.

    Returns:
      The documents of each row, by index.

    Example:
      >>> pack_rows([5, 3, 8, 2], 8)
      [[2], [0, 1], [3]]
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect.bisect_left(left, (lengths[index], -1))
        if place == len(left):
            rows.append([])
            space, row = room, len(rows) - 1
        else:
            space, row = left.pop(place)
        rows[row].append(index)
        if space > lengths[index]:
            bisect.insort(left, (space - lengths[index], row))
    return rows


def speedup(lengths: Sequence[int], padded: int, room: int) -> float:
    """Estimate how many times fewer tokens a step would go through.

    Args:
      lengths: Tokens of each document.
      padded: Tokens of all of them with padding, unpacked.
      room: Tokens of a packed row.

    Returns:
      The ratio: 1 gains nothing.
    """
    return padded / max(len(pack_rows(lengths, room)) * room, 1)
