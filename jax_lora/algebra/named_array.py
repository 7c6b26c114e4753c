"""Named arrays: products and broadcasts that pair axes by name instead of by position.

By default, a product is a `dot_general` with a batch dimension, of size 1 if there is no other.
Rematerialization policies such as `dots_with_no_batch_dims_saveable` are written for the products
of the model and must not save those of the adapter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax import lax

from jax_lora.algebra.named_axes import AxisName

Array = jax.Array
_UNIT: tuple[AxisName] = ("batch dimension of size 1",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NamedArray:
    """An array with a name for every axis."""

    array: Any
    axes: tuple[AxisName, ...] = dataclasses.field(metadata={"static": True})

    def size_of(self, name: AxisName) -> int:
        """Return the length of the axis of this name."""
        return self.array.shape[self.axes.index(name)]

    def astype(self, dtype: Any) -> NamedArray:
        """Cast the array."""
        return NamedArray(self.array.astype(dtype), self.axes)

    def arranged(self, want: Sequence[AxisName | None], shape: Sequence[int]) -> Array:
        """Transpose and reshape to the axes of `want`; None is an axis of size 1."""
        order = [self.axes.index(name) for name in want if name in self.axes]
        array = self.array if order == sorted(order) else lax.transpose(self.array, order)
        return _reshape(array, shape)

    def spread(self, want: Sequence[AxisName | None]) -> Array:
        """Transpose and expand to broadcast against an array with the axes `want`."""
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
      left: The first operand.
      right: The second operand.
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
    sizes = dict(zip((*left.axes, *right.axes), left.array.shape + right.array.shape, strict=True))
    shared = {*left.axes} & {*right.axes}
    role = {
        name: "free" if name not in shared else "kept" if name in keep else "summed"
        for name in sizes
    }
    # Per operand, groups of axes that become one axis of the product.
    groups = [_groups(left.axes, right.axes, role, flatten)]
    groups.append(_groups(right.axes, left.axes, role, flatten))
    of_role = lambda wanted, side: [x for x in groups[side] if role[x[0]] == wanted]  # noqa: E731
    if any({*of_role(each, 0)} != {*of_role(each, 1)} for each in ("kept", "summed")):
        # The operands have their common axes in different orders, so axes cannot be merged.
        groups = [[(name,) for name in each.axes] for each in (left, right)]
    kept, summed = of_role("kept", 0), of_role("summed", 0)
    names = tuple(itertools.chain(*kept, *of_role("free", 0), *of_role("free", 1)))
    arrays = [
        _reshape(each.array, [math.prod(sizes[name] for name in group) for group in of])
        for each, of in zip((left, right), groups, strict=True)
    ]
    hide = hidden and not kept
    if hide:  # see the top of this file
        arrays = [lax.expand_dims(array, [0]) for array in arrays]
        kept, groups = [_UNIT], [[_UNIT, *of] for of in groups]
    positions = lambda some: tuple(tuple(map(of.index, some)) for of in groups)  # noqa: E731
    left_array, right_array = arrays
    numbers: Any = (positions(summed), positions(kept))
    result = lax.dot_general(
        left_array, right_array, numbers, precision=precision, preferred_element_type=dtype
    )
    result = lax.squeeze(result, [0]) if hide else result
    return NamedArray(_reshape(result, [sizes[name] for name in names]), names)


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


def _sum_unshared(named: NamedArray, wanted: Collection[AxisName | None]) -> NamedArray:
    """Sum over the axes that are in neither the other operand nor the result."""
    removed = [axis for axis, name in enumerate(named.axes) if name not in wanted]
    if not removed:
        return named
    kept = tuple(name for name in named.axes if name in wanted)
    return NamedArray(lax.reduce_sum(named.array, removed), kept)


def _reshape(array: Array, shape: Sequence[int]) -> Array:
    return array if array.shape == tuple(shape) else lax.reshape(array, tuple(shape))
