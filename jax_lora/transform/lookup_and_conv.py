"""The rules of embedding lookups, grouped matrix products and convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora.algebra.low_rank import (
    LowRank,
    Parts,
    accumulation_dtype,
    apply_dropout,
    scaled,
    times_gain,
)
from jax_lora.algebra.moves import factor_entries
from jax_lora.algebra.named_array import NamedArray, product
from jax_lora.algebra.named_axes import RANK, AxisName
from jax_lora.transform.contraction import Contraction, Result
from jax_lora.transform.rules import Operand, Use
from jax_lora.transform.strategies import FACTORED, Choice
from jax_lora.transform.structural import gather_entries, gather_from, looked_up_axis

if TYPE_CHECKING:
    from jax_lora.transform.evaluate import Evaluate

Array = jax.Array

_TOKEN: AxisName = "token"
_ONLY = Choice(FACTORED, "the only low-rank form of this operation")


def read_lookup(weight: Operand) -> Use | None:
    """Name the axes of an embedding lookup, which selects whole rows along one axis."""
    axis, moves = looked_up_axis(weight), gather_entries(weight)
    if axis is None or moves is None:
        return None
    return Use("embedding", (weight.axes[axis],), (), 1, (), moves[0].axes, 0)


def lookup(evaluator: Evaluate, contractions: Sequence[Contraction]) -> list[Result]:
    """Look up rows of W0 and of the factor that has the looked-up axis."""
    (each,) = contractions
    value, ids, (name,) = each.value, each.data, each.use.summed
    new = tuple(n for n in each.use.out_axes if n is not None and n not in value.axes)
    rows = each.on_base()  # (*ids, *rest)
    entries = lambda factor, axis: gather_from(each.weight, factor, axis, ids)  # noqa: E731
    found = value.on_factors(factor_entries(name, entries, new))
    found = found.replace(base=rows, axes=each.use.out_axes)
    evaluator.note(each, _ONLY, tokens=math.prod(ids.shape[:-1]))
    result = _with_gain(found, rows, _rows_update(found, new))
    return [(value.replace(gain=None), Parts(result))]


def _rows_update(found: LowRank, new: Sequence[AxisName]) -> Array:
    """Contract the rows of the factors over the rank: (*ids, r) · (r, out) -> (*ids, out)."""
    a, b = found.factors
    rows, other = (a, b) if {*new} & {*a.axes} else (b, a)
    wide = rows.array.astype(accumulation_dtype(found.dtype))
    down = NamedArray(scaled(wide, found.scale, found.dtype), rows.axes)
    keep = {name for name in found.axes if name is not None}
    up = product(down, other.astype(found.dtype), keep, dtype=found.dtype)
    return up.arranged(found.axes, found.shape)


def _with_gain(found: LowRank, rows: Array, update: Array) -> Array:
    if found.gain is None:
        return rows + update
    # An id out of range gives NaN, which must not enter the derivative of the gain.
    known = ~jnp.isnan(rows)
    safe = jnp.where(known, rows, jnp.zeros((), rows.dtype))
    return jnp.where(known, times_gain(found, safe + update, found.axes), rows)


def read_ragged_dot(weight: Operand) -> Use | None:
    """Name the axes of (tokens, in) · (experts, in, out)."""
    numbers = weight.params.get("ragged_dot_dimension_numbers")
    operands = [len(var.aval.shape) for var in weight.eqn.invars]
    if numbers is None or weight.position != 1 or operands != [2, 3, 1]:
        return None
    contract, batch = (tuple(map(tuple, each)) for each in numbers.dot_dimension_numbers)
    ragged = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    is_plain = contract == ((1,), (1,)) and batch == ((), ()) and ragged == ((0,), (0,))
    if not is_plain or weight.params.get("group_offset") is not None:
        return None
    expert, inside, outside = weight.axes
    return Use(
        "dense", (inside,), (expert,), 0, (_TOKEN, inside), (_TOKEN, outside), weight.shape[1]
    )


def ragged_dot(evaluator: Evaluate, contractions: Sequence[Contraction]) -> list[Result]:
    """Multiply tokens, which are sorted by expert, with W0 and the factors of their expert."""
    (each,) = contractions
    x, value, sizes = each.inputs
    expert, inside, outside = value.axes
    a, b = value.factors
    if a.axes != (expert, inside, RANK) or b.axes != (expert, RANK, outside):
        return [None]
    evaluator.note(each, _ONLY, tokens=x.shape[0])
    base = each.on_base()
    precision = each.eqn.params.get("precision")
    product_of = lambda x, factor, dtype: lax.ragged_dot(  # noqa: E731
        x, factor.array.astype(x.dtype), sizes, precision, preferred_element_type=dtype
    )
    seen = apply_dropout(value, x)
    down = product_of(seen, a, accumulation_dtype(x.dtype))  # (tokens, in) · (experts, in, r)
    update = product_of(scaled(down, value.scale, x.dtype), b, base.dtype)  # (tokens, out)
    again = each.on_base_after_dropout(seen)
    if value.gain is not None:
        value = value.replace(gain=_gain_by_token(value.gain, expert, x, sizes))
    return [(value, Parts(base, update, again))]


def _gain_by_token(gain: NamedArray, expert: AxisName, x: Array, sizes: Array) -> NamedArray:
    """Repeat the gain of each expert over its tokens: (experts, out) -> (tokens, out)."""
    ends = jnp.cumsum(sizes)
    which = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=ends.dtype), side="right")
    by_token = jnp.take(gain.array, which, axis=gain.axes.index(expert), mode="clip")
    return NamedArray(by_token, tuple(_TOKEN if name == expert else name for name in gain.axes))


def read_convolution(weight: Operand) -> Use | None:
    """Name the axes of a convolution, which sums over its window and the input channels."""
    if weight.position != 1:
        return None
    numbers = weight.params["dimension_numbers"]
    out_axis, *in_axes = numbers.rhs_spec  # (out, in, *spatial) as axes of the kernel
    out = range(len(weight.out_shape))
    channel = numbers.out_spec[1]
    return Use(
        kind="conv",
        summed=tuple(weight.axes[axis] for axis in in_axes),
        batched=(),
        data=0,
        data_axes=(),
        out_axes=tuple(weight.axes[out_axis] if axis == channel else None for axis in out),
        terms=math.prod(weight.shape[axis] for axis in in_axes),
    )


def convolution(evaluator: Evaluate, contractions: Sequence[Contraction]) -> list[Result]:
    """Convolve with W0, and add the down- and up-projection by the factors."""
    (each,) = contractions
    x, value = each.inputs
    a, b = value.factors
    numbers = each.eqn.params["dimension_numbers"]
    out_name = value.axes[numbers.rhs_spec[0]]
    by_groups = each.eqn.params["batch_group_count"] != 1
    ins = {name for name in each.use.summed if name is not None}
    if by_groups or {*b.axes} != {RANK, out_name} or {*a.axes} != {RANK, *ins}:
        return [None]
    base = each.on_base()
    evaluator.note(each, _ONLY, tokens=base.size // base.shape[numbers.out_spec[1]])
    seen = apply_dropout(value, x)
    update = _mix_channels(_down_convolution(each, seen, a, numbers), b, each.eqn, base)
    again = each.on_base_after_dropout(seen)
    return [(value, Parts(base, update, again))]


def _down_convolution(each: Contraction, x: Array, a: NamedArray, numbers: Any) -> Array:
    """Down-project: convolve with the kernel's window to `rank` channels per group."""
    value, params = each.value, each.eqn.params
    out_axis = numbers.rhs_spec[0]
    order, shape = list(value.axes), list(value.shape)
    order[out_axis], shape[out_axis] = RANK, a.size_of(RANK)
    kernel = a.arranged(order, shape)
    groups = params["feature_group_count"]
    kernel = jnp.concatenate([kernel.astype(x.dtype)] * groups, axis=out_axis)
    same = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
    down = lax.conv_general_dilated(
        x,
        kernel,
        dimension_numbers=numbers,
        feature_group_count=groups,
        preferred_element_type=accumulation_dtype(x.dtype),
        **{name: params[name] for name in same},
    )
    return scaled(down, value.scale, x.dtype)


def _mix_channels(down: Array, b: NamedArray, eqn: Any, base: Array) -> Array:
    """Up-project the `rank` channels of each group: a 1x1 convolution with b."""
    groups = eqn.params["feature_group_count"]
    channel = eqn.params["dimension_numbers"].out_spec[1]
    up = b.array if b.axes[0] == RANK else b.array.T  # (r, out)
    rank, outs = up.shape
    down = jnp.moveaxis(down, channel, -1)  # (..., groups * r)
    down = down.reshape(*down.shape[:-1], groups, rank)
    up = up.astype(down.dtype).reshape(rank, groups, outs // groups)
    mixed = jnp.einsum("...gr,rgo->...go", down, up, preferred_element_type=base.dtype)
    return jnp.moveaxis(mixed.reshape(*mixed.shape[:-2], math.prod(mixed.shape[-2:])), -1, channel)
