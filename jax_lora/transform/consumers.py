"""Rules for lookups, grouped products and convolutions: W0's own, plus what the factors add."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora import labelled, lowrank
from jax_lora.labels import RANK, Label
from jax_lora.lowrank import LowRank
from jax_lora.transform.interpreter import Interpreter, Value, bind, is_lowrank, rule

Outputs = list[Value] | None


_TOKEN: Label = "token"


def _floating(*arrays: Any) -> bool:
    return all(jnp.issubdtype(array.dtype, jnp.floating) for array in arrays)


def _is_gained_and_dropped(value: LowRank) -> bool:
    return value.gain is not None and value.key is not None


# -----------------------------------------------------------------------------------------------
# gather: embedding lookup, and indexing a stack by an array
# -----------------------------------------------------------------------------------------------


@rule("gather")
def _gather(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    value, indices = inputs
    if not is_lowrank(value) or is_lowrank(indices):
        return None
    axis = _looked_up_axis(eqn, value)
    if axis is None or (label := value.w_labels[axis]) is None:
        return None
    value = interpreter.fresh(value)
    (rows,) = bind(eqn, value.w, indices)
    looked_up = [("index", label, position) for position in range(indices.ndim - 1)]
    offset = eqn.params["dimension_numbers"].offset_dims
    rest = iter(other for other in value.w_labels if other != label)
    ids = iter(looked_up)
    out_labels = [next(rest) if dim in offset else next(ids) for dim in range(rows.ndim)]

    def look_up(factor: jax.Array, labels: tuple[Label, ...]) -> tuple[jax.Array, tuple]:
        if label not in labels:
            return factor, labels
        taken = _take(eqn, factor, labels.index(label), indices)
        return taken, (*looked_up, *(other for other in labels if other != label))

    found = value.on_factors(look_up).replace(w=rows, w_labels=tuple(out_labels))
    if value.side(label) == (True, True):
        return [found]  # some layers or experts of a stack: still kernels
    if value.bias is not None:
        return None
    interpreter.factored(eqn, value, math.prod(indices.shape[:-1]))
    return [_joined_rows(found, _rows_delta(found, rows.dtype))]


def _looked_up_axis(eqn: Any, value: LowRank) -> int | None:
    """Return the one axis that whole rows are taken along, or None for any other gather."""
    numbers = eqn.params["dimension_numbers"]
    if len(numbers.start_index_map) != 1 or getattr(numbers, "operand_batching_dims", ()):
        return None
    axis = numbers.start_index_map[0]
    whole = tuple(1 if dim == axis else size for dim, size in enumerate(value.shape))
    if numbers.collapsed_slice_dims != (axis,) or tuple(eqn.params["slice_sizes"]) != whole:
        return None
    return axis


def _take(eqn: Any, factor: jax.Array, axis: int, indices: jax.Array) -> jax.Array:
    """Take rows of a factor as the equation takes them of W0: (*ids, *rest)."""
    rows = jnp.moveaxis(factor, axis, 0)
    ids = indices.ndim - 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(ids, ids + rows.ndim - 1)),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )
    mode = eqn.params["mode"]
    return lax.gather(rows, indices, numbers, (1, *rows.shape[1:]), mode=mode, fill_value=0)


def _joined_rows(found: LowRank, added: jax.Array) -> jax.Array:
    """Add to rows of W0, and apply the gain to them."""
    if found.gain is None:
        return found.w + added
    # An id out of range may have given NaN, of which the gain's derivative is to know nothing.
    known = ~jnp.isnan(found.w)
    rows = jnp.where(known, found.w, jnp.zeros((), found.dtype))
    return jnp.where(known, lowrank.joined(found, rows, added, found.w_labels), found.w)


def _rows_delta(found: LowRank, dtype: Any) -> jax.Array:
    """Contract the rows' factors over the rank: (*ids, r) · (r, out) -> (*ids, out)."""
    ids_in_a = len(found.a_labels) > 1 and isinstance(found.a_labels[0], tuple)
    rows, labels = (found.a, found.a_labels) if ids_in_a else (found.b, found.b_labels)
    other, other_labels = (found.b, found.b_labels) if ids_in_a else (found.a, found.a_labels)
    wide = lowrank.accumulation_dtype(dtype)
    thin = (rows.astype(wide) * jnp.asarray(found.scale, wide)).astype(dtype)
    rows, have = labelled.product(
        thin, labels, other.astype(dtype), other_labels, found.w_labels, dtype=dtype
    )
    return labelled.arrange(rows, have, found.w_labels, found.shape)


# -----------------------------------------------------------------------------------------------
# ragged_dot: tokens sorted by expert
# -----------------------------------------------------------------------------------------------


@rule("ragged_dot", "ragged_dot_general")
def _ragged_dot(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    x, value, sizes, *rest = inputs
    if rest or is_lowrank(x) or not is_lowrank(value) or not _is_plain_ragged(eqn, x, value):
        return None
    if value.bias is not None:
        return None
    expert, inside, outside = value.w_labels
    if value.a_labels != (expert, inside, RANK) or value.b_labels != (expert, RANK, outside):
        return None
    interpreter.factored(eqn, value, x.shape[0])
    (base,) = bind(eqn, x, value.w, sizes)
    value = interpreter.fresh(value)
    wide = lowrank.accumulation_dtype(x.dtype)
    dropped = lowrank.dropped(value, x)
    precision = eqn.params.get("precision")
    thin = lax.ragged_dot(  # (tokens, in) · (experts, in, r) -> (tokens, r)
        dropped,
        value.a.astype(x.dtype),
        sizes,
        precision=precision,
        preferred_element_type=wide,
    )
    thin = (thin * jnp.asarray(value.scale, wide)).astype(x.dtype)
    added = lax.ragged_dot(  # (tokens, r) · (experts, r, out) -> (tokens, out)
        thin,
        value.b.astype(x.dtype),
        sizes,
        precision=precision,
        preferred_element_type=base.dtype,
    )
    again = bind(eqn, dropped, value.w, sizes)[0] if _is_gained_and_dropped(value) else None
    value = value.on_factors(lambda factor, labels: _by_token(factor, labels, value, x, sizes))
    return [lowrank.joined(value, base, added, (_TOKEN, outside), again)]


def _by_token(
    factor: jax.Array, labels: tuple[Label, ...], value: LowRank, x: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, tuple[Label, ...]]:
    """Give every token its expert's gain: (experts, out) -> (tokens, out)."""
    if factor is not value.gain:
        return factor, labels
    ends = jnp.cumsum(sizes)
    expert = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=ends.dtype), side="right")
    gain = jnp.take(factor, expert, axis=labels.index(value.w_labels[0]), mode="clip")
    return gain, tuple(_TOKEN if label == value.w_labels[0] else label for label in labels)


def _is_plain_ragged(eqn: Any, x: jax.Array, value: LowRank) -> bool:
    if x.ndim != 2 or len(value.shape) != 3 or not _floating(x, value):
        return False
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if eqn.params.get("group_offset") is not None or numbers is None:
        return False
    (contract, batch) = numbers.dot_dimension_numbers
    return (
        tuple(map(tuple, contract)) == ((1,), (1,))
        and tuple(map(tuple, batch)) == ((), ())
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )


# -----------------------------------------------------------------------------------------------
# conv_general_dilated
# -----------------------------------------------------------------------------------------------


@rule("conv_general_dilated")
def _convolution(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    x, value = inputs
    if is_lowrank(x) or eqn.params["batch_group_count"] != 1 or not _floating(x, value):
        return None
    numbers = eqn.params["dimension_numbers"]
    out_axis, *in_axes = numbers.rhs_spec  # (out, in, *spatial) as axes of the kernel
    out_label, in_labels = value.w_labels[out_axis], [value.w_labels[axis] for axis in in_axes]
    if set(value.b_labels) != {RANK, out_label} or set(value.a_labels) != {RANK, *in_labels}:
        return None
    value = interpreter.fresh(value)
    (base,) = bind(eqn, x, value.w)
    interpreter.factored(eqn, value, base.size // base.shape[numbers.out_spec[1]])
    dropped = lowrank.dropped(value, x)
    added = _mix_channels(_thin_convolution(eqn, dropped, value, numbers), value, eqn, base)
    again = bind(eqn, dropped, value.w)[0] if _is_gained_and_dropped(value) else None
    labels = [out_label if axis == numbers.out_spec[1] else None for axis in range(base.ndim)]
    joined = lowrank.joined(value, base, added, labels, again)
    return [lowrank.biased(value, joined, labels)]


def _thin_convolution(eqn: Any, x: jax.Array, value: LowRank, numbers: Any) -> jax.Array:
    """Convolve to rank channels per group, with the kernel's own window."""
    order = [
        RANK if axis == numbers.rhs_spec[0] else label for axis, label in enumerate(value.w_labels)
    ]
    a = lax.transpose(value.a, [value.a_labels.index(label) for label in order])
    groups = eqn.params["feature_group_count"]
    a = jnp.concatenate([a.astype(x.dtype)] * groups, axis=numbers.rhs_spec[0])
    wide = lowrank.accumulation_dtype(x.dtype)
    same = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
    thin = lax.conv_general_dilated(
        x,
        a,
        dimension_numbers=numbers,
        feature_group_count=groups,
        preferred_element_type=wide,
        **{name: eqn.params[name] for name in same},
    )
    return (thin * jnp.asarray(value.scale, wide)).astype(x.dtype)


def _mix_channels(thin: jax.Array, value: LowRank, eqn: Any, base: jax.Array) -> jax.Array:
    """Turn each group's rank channels into its output channels: a 1x1 convolution with b."""
    groups = eqn.params["feature_group_count"]
    channel = eqn.params["dimension_numbers"].out_spec[1]
    b = value.b if value.b_labels[0] == RANK else value.b.T  # (r, out)
    rank, outs = b.shape
    thin = jnp.moveaxis(thin, channel, -1)  # (..., groups * r)
    thin = thin.reshape(*thin.shape[:-1], groups, rank)
    b = b.astype(thin.dtype).reshape(rank, groups, outs // groups)
    mixed = jnp.einsum("...gr,rgo->...go", thin, b, preferred_element_type=base.dtype)
    return jnp.moveaxis(mixed.reshape(*mixed.shape[:-2], math.prod(mixed.shape[-2:])), -1, channel)
