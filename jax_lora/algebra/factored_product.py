"""The low-rank product of data with the factors: scale * (x · a) · b.

`project_down` multiplies x with the first factor; `project_up` multiplies the result with the
second. Values with the same data share one down-projection, because most of its time is spent on
reading x.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_lora.algebra.low_rank import LowRank, accumulation_dtype, scaled
from jax_lora.algebra.named_array import NamedArray, product
from jax_lora.algebra.named_axes import RANK, AxisName

# The name of scale * x · first for policies of `jax.checkpoint`: rank-sized, and cheap to keep.
DOWN_PROJECTION = "lora_down"

Array = jax.Array
Pair = tuple[NamedArray, NamedArray]


@dataclasses.dataclass(frozen=True)
class Projection:
    """A plan of the low-rank product: how the axes of x pair with the axes of the factors."""

    x_axes: tuple[AxisName, ...]  # paired axes have the names of the weight's axes
    a_first: bool  # False if x is contracted with the output axes, and with `b` first
    out_axes: tuple[AxisName | None, ...]  # of the result; None for an axis of size 1
    out_shape: tuple[int, ...]
    scale: float
    dtype: Any  # of the result
    precision: Any = None  # as in `lax.dot_general`
    x_first: bool = True  # whether the axes of x come first in the result: saves a transpose
    flatten: bool = False  # whether to merge adjacent axes before the products

    def order(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Return the values for `a` and `b` in the order in which x is multiplied."""
        return (a, b) if self.a_first else (b, a)

    def paired_axes(self, first: NamedArray, second: NamedArray) -> tuple[int, ...] | None:
        """Return the axes of x that the first factor sums; None if other axes are paired."""
        paired = tuple(axis for axis, name in enumerate(self.x_axes) if name in first.axes)
        names = {self.x_axes[axis] for axis in paired}
        only_sums = names == {*first.axes} - {RANK} and not names & {*second.axes, *self.out_axes}
        return paired if only_sums and not {*self.x_axes} & {*second.axes} else None


def projection(
    value: LowRank,
    x: Array,
    x_axes: Sequence[AxisName],
    out_axes: Sequence[AxisName | None],
    out_shape: Sequence[int],
    *,
    dtype: Any,
    **options: Any,
) -> Projection | None:
    """Plan the low-rank product of x with the factors of a value, with the fields of `Projection`.

    The result is None if no axis of a factor is summed, so that the full weight is needed.
    """
    sizes = dict(zip(x_axes, x.shape, strict=True))
    summed = [
        [name for name in sizes if name in factor.axes and name not in out_axes]
        for factor in value.factors
    ]
    if not any(summed):
        return None
    by_a, by_b = (math.prod(sizes[name] for name in names) for names in summed)
    return Projection(
        x_axes=tuple(x_axes),
        a_first=by_a >= by_b,  # the factor that sums over more of x
        out_axes=tuple(out_axes),
        out_shape=tuple(out_shape),
        scale=value.scale,
        dtype=jnp.dtype(dtype),
        **options,
    )


def multiply(plans: Sequence[Projection], x: Array, factors: Sequence[Pair]) -> list[Array]:
    """Compute scale * (x · a) · b for several values with the same data, given `(a, b)` of each.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), equation 3.
    """
    return _multiply(tuple(plans), x, tuple(factors))


@functools.partial(jax.jit, static_argnums=0)  # equal layers are traced once
def _multiply(plans: tuple[Projection, ...], x: Array, factors: Sequence[Pair]) -> list[Array]:
    pairs = [plan.order(*pair) for plan, pair in zip(plans, factors, strict=True)]
    downs = project_down(plans, x, pairs)  # (tokens, r) each
    return [
        project_up(plan, _named(down), second)  # (tokens, out)
        for plan, down, (_, second) in zip(plans, downs, pairs, strict=True)
    ]


def _named(down: NamedArray) -> NamedArray:
    return NamedArray(checkpoint_name(down.array, DOWN_PROJECTION), down.axes)


def project_down(
    plans: Sequence[Projection], x: Array, pairs: Sequence[Pair], *, hidden: bool = True
) -> list[NamedArray]:
    """Compute scale * x · first of each value, in one product if they sum the same axes.

    The factors of a value, (in, r) and (r, out), are in the order of its plan; all plans have the
    same precision. `hidden` is as in `named_array.product`. The results are (tokens, r).
    """
    paired = plans[0].paired_axes(*pairs[0])
    alike = all(plan.paired_axes(*pair) == paired for plan, pair in zip(plans, pairs, strict=True))
    if len(plans) == 1 or paired is None or not alike:
        each = zip(plans, pairs, strict=True)
        downs = [_times_first(plan, x, pair, hidden) for plan, pair in each]
    else:
        downs = _times_side_by_side(plans, x, pairs, paired, hidden)
    wide = accumulation_dtype(x.dtype)
    return [  # the scale is applied here, to the smallest array of the product
        NamedArray(scaled(down.array.astype(wide), plan.scale, x.dtype), down.axes)
        for plan, down in zip(plans, downs, strict=True)
    ]


def _times_side_by_side(
    plans: Sequence[Projection],
    x: Array,
    pairs: Sequence[Pair],
    paired: Sequence[int],
    hidden: bool,
) -> list[NamedArray]:
    """Multiply x with the first factors of all values in one product."""
    inputs = [x.shape[axis] for axis in paired]
    aligned = [
        first.arranged(  # (in, r), the input axes in x's order
            (*(plan.x_axes[axis] for axis in paired), RANK), (*inputs, first.size_of(RANK))
        ).astype(x.dtype)
        for plan, (first, _) in zip(plans, pairs, strict=True)
    ]
    axes = (*(plans[0].x_axes[axis] for axis in paired), RANK)
    side_by_side = NamedArray(lax.concatenate(aligned, len(paired)), axes)  # (in, sum of r)
    down = _times_first(plans[0], x, (side_by_side, pairs[0][1]), hidden)  # (tokens, sum of r)
    ranks = [each.shape[-1] for each in aligned]
    pieces = lax.split(down.array, ranks, axis=down.axes.index(RANK))
    return [NamedArray(piece, down.axes) for piece in pieces]


def _times_first(plan: Projection, x: Array, pair: Pair, hidden: bool) -> NamedArray:
    first, second = pair
    return product(
        NamedArray(x, plan.x_axes),
        first.astype(x.dtype),
        {*plan.out_axes, *second.axes},
        plan.precision,
        # The matmul accumulates in float32 inside. A float32 result would make its transpose a
        # float32 matmul with a float32 copy of x.
        x.dtype,
        hidden=hidden,
        flatten=plan.flatten,
    )


def project_up(
    plan: Projection, down: NamedArray, second: NamedArray, *, hidden: bool = True
) -> Array:
    """Multiply scale * x · first, (tokens, r), with the second factor, in the result's layout."""
    operands = (down, second.astype(down.array.dtype))
    left, right = operands if plan.x_first else operands[::-1]
    options: dict[str, Any] = {"hidden": hidden, "flatten": plan.flatten}
    result = product(left, right, set(plan.out_axes), plan.precision, plan.dtype, **options)
    return result.arranged(plan.out_axes, plan.out_shape)
