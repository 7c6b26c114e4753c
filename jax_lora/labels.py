"""Labels: a name for every axis of a kernel that survives transposes, reshapes and slices.

The axes of W0 start with the labels 0, 1, 2, ...; a factor's axes carry the label of the axis of
W0 that they belong to. An axis of size 1 that belongs to no factor has the label None. Merging
axes makes the label ("merge", labels); cutting one makes ("split", label, sizes, position), so a
label always tells which axes of W0 it came from (`origins`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

Label = Hashable  # an int, or a tuple that begins with "merge", "split" or "index"
RANK: Label = "rank"  # the axis that a and b share and W0 has not


def merge_label(labels: Sequence[Label]) -> Label:
    """Name the axis made by merging axes."""
    return labels[0] if len(labels) == 1 else ("merge", *labels)


def split_labels(label: Label, sizes: Sequence[int]) -> tuple[Label, ...]:
    """Name the axes made by cutting one axis into several."""
    if len(sizes) == 1:
        return (label,)
    return tuple(("split", label, tuple(sizes), position) for position in range(len(sizes)))


def origins(label: Label) -> frozenset[int]:
    """Return the axes of W0 that a label came from.

    Example:
      >>> sorted(origins(("merge", 1, ("split", 2, (2, 3), 0))))
      [1, 2]
    """
    if isinstance(label, int):
        return frozenset({label})
    if isinstance(label, tuple) and label[0] == "merge":
        return frozenset().union(*map(origins, label[1:]))
    if isinstance(label, tuple) and label[0] in ("split", "index"):
        return origins(label[1])
    return frozenset()


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]] | None:
    """Pair the axes of two shapes into the smallest groups of equal size.

    Args:
      old: Shape before, without axes of size 1.
      new: Shape after, without axes of size 1.

    Returns:
      Groups of (old axes, new axes) in order, or None for shapes with an empty axis, for which a
      pairing means nothing.

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


def relabel(labels: Sequence[Label], new_sizes: Sequence[int]) -> tuple[Label, ...]:
    """Name the axes that one reshape group ends with.

    Args:
      labels: Labels of the group's axes before the reshape.
      new_sizes: Sizes of the group's axes after it.

    Returns:
      A label per new axis. Cutting what was merged at the same place gives the old labels back
      only by way of `origins`: labels are names, not an algebra of their own.
    """
    return split_labels(merge_label(labels), new_sizes)
