"""Named arrays: products and broadcasts that pair axes by name instead of by position.

By default, a product is a `dot_general` with a batch dimension, of size 1 if there is no other.
Rematerialization policies such as `dots_with_no_batch_dims_saveable` are written for the products
of the model and must not save those of the adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax import lax

from jax_lora.algebra.named_axes import AxisName

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NamedArray:
    """An array with named axes.

    Args:
      array: The array.
      axes: The name of every axis.
    """

    array: Any
    axes: tuple[AxisName, ...] = dataclasses.field(metadata={"static": True})

    def size_of(self, name: AxisName) -> int:
        """Return the length of the axis of this name."""
        return self.array.shape[self.axes.index(name)]

    def astype(self, dtype: Any) -> NamedArray:
        """Cast the array."""
        return NamedArray(self.array.astype(dtype), self.axes)

    def arranged(self, want: Sequence[AxisName | None], shape: Sequence[int]) -> Array:
        """Transpose and reshape to the axes of `want`.

        Args:
          want: The name of every axis of the result; None for an axis of size 1.
          shape: Shape of the result.

        Returns:
          An array of that shape.
        """
        order = [self.axes.index(name) for name in want if name in self.axes]
        array = self.array if order == sorted(order) else lax.transpose(self.array, order)
        return _reshape(array, shape)

    def spread(self, want: Sequence[AxisName | None]) -> Array:
        """Transpose and expand to broadcast against an array with the axes `want`.

        Args:
          want: The name of every axis of the other array, which include those of this array.

        Returns:
          An array with one axis per entry of `want`.
        """
        order = [name for name in want if name in self.axes]
        array = lax.transpose(self.array, [self.axes.index(name) for name in order])
        return lax.expand_dims(array, [i for i, name in enumerate(want) if name not in self.axes])


def product(
    left: NamedArray,
    right: NamedArray,
    keep: Collection[AxisName | None],
    precision: Any = None,
    dtype: Any = None,
    *,
    hidden: bool = True,
    flatten: bool = False,
) -> NamedArray:
    """Multiply two arrays and sum over the names that are not kept.

    Args:
      left: A named array.
      right: Another named array.
      keep: Names of the result.
      precision: As in `lax.dot_general`.
      dtype: Type of the result; by default that of the operands.
      hidden: Whether to hide the product from rematerialization policies. Policies do not see
        tangents, so a tangent needs no batch dimension; without one, XLA preserves the order of
        axes in its transpose.
      flatten: Whether to merge adjacent axes with the same role before the product.

    Returns:
      The product, with the common names first, then those of left, then those of right.
    """
    left = _sum_unshared(left, {*right.axes, *keep})
    right = _sum_unshared(right, {*left.axes, *keep})
    role = _roles(left.axes, right.axes, keep)
    left_groups = _groups(left.axes, right.axes, role, flatten)
    right_groups = _groups(right.axes, left.axes, role, flatten)
    if {*left_groups} & {*right_groups} != {*filter(_of(role, "kept", "summed"), left_groups)}:
        # The operands have their common axes in different orders, so axes cannot be merged.
        left_groups, right_groups = ([(x,) for x in each.axes] for each in (left, right))
    summed = list(filter(_of(role, "summed"), left_groups))
    kept = list(filter(_of(role, "kept"), left_groups))
    free = [
        *filter(_of(role, "free"), left_groups),
        *filter(_of(role, "free"), right_groups),
    ]
    sizes = dict(zip((*left.axes, *right.axes), left.array.shape + right.array.shape, strict=True))
    result = _dot(
        _flattened(left, left_groups, sizes),
        left_groups,
        _flattened(right, right_groups, sizes),
        right_groups,
        summed,
        kept,
        hidden,
        precision,
        dtype,
    )
    names = tuple(name for group in (*kept, *free) for name in group)
    return NamedArray(_reshape(result, [sizes[name] for name in names]), names)


def _roles(
    left: Sequence[AxisName], right: Sequence[AxisName], keep: Collection[AxisName | None]
) -> dict[AxisName, str]:
    both = {name for name in left if name in right}
    kind = lambda name: "free" if name not in both else "kept" if name in keep else "summed"  # noqa: E731
    return {name: kind(name) for name in (*left, *right)}


def _of(role: dict[AxisName, str], *wanted: str) -> Callable[[tuple[AxisName, ...]], bool]:
    return lambda group: role[group[0]] in wanted


def _groups(
    axes: Sequence[AxisName], others: Sequence[AxisName], role: dict[AxisName, str], merge: bool
) -> list[tuple[AxisName, ...]]:
    """Group axes that can be merged: equal in role, and adjacent in both operands."""
    groups: list[tuple[AxisName, ...]] = []
    for name in axes:
        last = groups[-1][-1] if groups else None
        joins = merge and groups and role[last] == role[name]
        if joins and role[name] != "free":
            joins = list(others).index(name) == list(others).index(last) + 1
        if joins:
            groups[-1] = (*groups[-1], name)
        else:
            groups.append((name,))
    return groups


def _flattened(
    named: NamedArray, groups: Sequence[tuple[AxisName, ...]], sizes: dict[AxisName, int]
) -> Array:
    return _reshape(named.array, [math.prod(sizes[name] for name in group) for group in groups])


def _dot(
    left: Array,
    left_groups: Sequence[Any],
    right: Array,
    right_groups: Sequence[Any],
    summed: Sequence[Any],
    kept: Sequence[Any],
    hidden: bool,
    precision: Any,
    dtype: Any,
) -> Array:
    hide = hidden and not kept
    if hide:  # see the top of this file
        left, right = lax.expand_dims(left, [0]), lax.expand_dims(right, [0])
    axes = lambda groups, of: tuple(list(of).index(group) + hide for group in groups)  # noqa: E731
    batch = ((0,), (0,)) if hide else (axes(kept, left_groups), axes(kept, right_groups))
    numbers = ((axes(summed, left_groups), axes(summed, right_groups)), batch)
    result = lax.dot_general(
        left, right, numbers, precision=precision, preferred_element_type=dtype
    )
    return lax.squeeze(result, [0]) if hide else result


def _sum_unshared(named: NamedArray, wanted: Collection[AxisName | None]) -> NamedArray:
    """Sum over the axes that are in neither the other operand nor the result."""
    gone = [axis for axis, name in enumerate(named.axes) if name not in wanted]
    if not gone:
        return named
    kept = tuple(name for name in named.axes if name in wanted)
    return NamedArray(lax.reduce_sum(named.array, gone), kept)


def _reshape(array: Array, shape: Sequence[int]) -> Array:
    return array if array.shape == tuple(shape) else lax.reshape(array, tuple(shape))
