"""Names of the axes of a kernel, which track the axes through transposes, reshapes and slices.

The axes of W0 are initially named 0, 1, 2, ...; an axis of a factor has the name of the
corresponding axis of W0. An axis of size 1 that belongs to no factor has the name None. Merged axes
have the name ("merge", *names); split axes have the names ("split", name, sizes, position). Every
name therefore determines the axes of W0 that it originates from (`origins`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

AxisName = Hashable  # an int, or a tuple that begins with "merge", "split" or "index"
RANK: AxisName = "rank"  # the axis that a and b share and that W0 does not have


def merge_names(names: Sequence[AxisName]) -> AxisName:
    """Return the name of a merged axis."""
    return names[0] if len(names) == 1 else ("merge", *names)


def split_name(name: AxisName, sizes: Sequence[int]) -> tuple[AxisName, ...]:
    """Return the names of the axes that one axis is split into."""
    if len(sizes) == 1:
        return (name,)
    return tuple(("split", name, tuple(sizes), position) for position in range(len(sizes)))


def origins(name: AxisName) -> frozenset[int]:
    """Return the axes of W0 that a name originates from.

    Example:
      >>> sorted(origins(("merge", 1, ("split", 2, (2, 3), 0))))
      [1, 2]
    """
    if isinstance(name, int):
        return frozenset({name})
    if isinstance(name, tuple) and name[0] == "merge":
        return frozenset().union(*map(origins, name[1:]))
    if isinstance(name, tuple) and name[0] in ("split", "index"):
        return origins(name[1])
    return frozenset()


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]] | None:
    """Pair the axes of two shapes into the smallest groups of equal size.

    Args:
      old: Shape before the reshape, without axes of size 1.
      new: Shape after the reshape, without axes of size 1.

    Returns:
      Groups of (old axes, new axes) in order. None for shapes with an axis of size 0, for which
      the pairing is not unique.

    Example:
      >>> reshape_groups([8, 6, 5], [8, 30]), reshape_groups([12], [3, 4])
      ([([0], [0]), ([1, 2], [1])], [([0], [0, 1])])
    """
    if 0 in old or 0 in new or math.prod(old) != math.prod(new):
        return None
    groups = []
    i = j = 0
    while i < len(old):
        left, right = [i], [j]
        i, j = i + 1, j + 1
        while (have := math.prod(old[k] for k in left)) != (
            want := math.prod(new[k] for k in right)
        ):
            if have < want:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        groups.append((left, right))
    return groups
