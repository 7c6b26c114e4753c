"""Packing: several examples in one sequence, with little padding."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack examples with best-fit decreasing: the longest first, into the fullest row with room.

    Args:
      lengths: Tokens of each example, at most `room`.
      room: Tokens of a packed row.

    Returns:
      The indices of the examples in each row.

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
    """Estimate the reduction of the number of tokens by packing.

    Args:
      lengths: Tokens of each example.
      padded: Number of tokens without packing, with padding.
      room: Tokens of a packed row.

    Returns:
      The ratio of the tokens without and with packing.
    """
    return padded / max(len(pack_rows(lengths, room)) * room, 1)
