"""Track a kernel's axes by name through transposes, reshapes and slices.

The axes of W0 are named 0, 1, 2, ..., and an axis of a factor has the name of the corresponding
axis of W0. Structural operations make new names: `Merged` for axes that a reshape merges, `Split`
for the parts of an axis that it splits, `Index` for the axes of the indices that select entries of
an axis. Every name therefore determines the axes of W0 that it is derived from (`origins`).
Strings, and pairs of a string and a number, name axes that W0 does not have. None is a size-1 axis
that no factor has, such as one that a reshape or broadcast adds.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence

RANK = "rank"  # the rank axis, shared by a and b and absent from W0


@dataclasses.dataclass(frozen=True)
class Merged:
    """The name of axes that are merged into one, in order."""

    names: tuple[AxisName, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """The name of one of the axes that an axis is split into."""

    name: AxisName  # of the axis before it is split
    sizes: tuple[int, ...]  # of all its parts
    position: int  # of this part


@dataclasses.dataclass(frozen=True)
class Index:
    """The name of an axis of the indices that select entries of an axis: layers, or experts."""

    name: AxisName  # of the axis whose entries are selected
    position: int  # among the axes of the indices


AxisName = int | str | tuple[str, int] | Merged | Split | Index | None


def merge_names(names: Sequence[AxisName]) -> AxisName:
    """Return the name of a merged axis."""
    return names[0] if len(names) == 1 else Merged(tuple(names))


def split_name(name: AxisName, sizes: Sequence[int]) -> tuple[AxisName, ...]:
    """Return the names of the axes that one axis is split into."""
    if len(sizes) == 1:
        return (name,)
    return tuple(Split(name, tuple(sizes), position) for position in range(len(sizes)))


def origins(name: AxisName) -> frozenset[int]:
    """Return the axes of W0 that a name is derived from.

    Example:
      >>> sorted(origins(Merged((1, Split(2, (2, 3), 0)))))
      [1, 2]
    """
    match name:
        case int():
            return frozenset({name})
        case Merged():
            return frozenset().union(*map(origins, name.names))
        case Split() | Index():
            return origins(name.name)
        case _:
            return frozenset()


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]] | None:
    """Pair the axes of two shapes into the smallest groups of equal size.

    Args:
      old: Shape before the reshape, without axes of size 1.
      new: Shape after the reshape, without axes of size 1.

    Returns:
      Groups of (old axes, new axes) in order. None if the shapes have different numbers of
      elements, or an axis of size 0, for which the grouping is not unique.

    Example:
      >>> reshape_groups([8, 6, 5], [8, 30]), reshape_groups([12], [3, 4])
      ([([0], [0]), ([1, 2], [1])], [([0], [0, 1])])
    """
    old_ends, new_ends = (list(itertools.accumulate(shape, operator.mul)) for shape in (old, new))
    if 0 in old or 0 in new or old_ends[-1:] != new_ends[-1:]:
        return None
    groups, i, j = [], 0, 0
    for end in sorted({*old_ends} & {*new_ends}):  # a group ends where both shapes have a boundary
        next_i, next_j = old_ends.index(end) + 1, new_ends.index(end) + 1
        groups.append((list(range(i, next_i)), list(range(j, next_j))))
        i, j = next_i, next_j
    return groups
