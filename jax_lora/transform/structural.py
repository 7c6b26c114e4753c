"""Rules for operations that move, cut, cast or scale a weight: the structure goes along."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

from jax_lora import lowrank
from jax_lora.lowrank import LowRank
from jax_lora.transform.interpreter import Interpreter, Value, bind, is_lowrank, structural_rule

Outputs = list[Value] | None


# -----------------------------------------------------------------------------------------------
# The same numbers
# -----------------------------------------------------------------------------------------------


@structural_rule("copy", "copy_p", "name", "device_put", "optimization_barrier", "pvary", "pcast")
def _same(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    arrays = bind(eqn, *(value.w if is_lowrank(value) else value for value in inputs))
    return [
        value.replace(w=array) if is_lowrank(value) else array
        for value, array in zip(inputs, arrays, strict=True)
    ]


@structural_rule("stop_gradient")
def _stop_gradient(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    return [jax.tree.map(lax.stop_gradient, inputs[0])]


@structural_rule("convert_element_type")
def _convert(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return None
    # The factors keep their own type; they are cast where they meet data.
    return [inputs[0].replace(w=bind(eqn, inputs[0].w)[0])]


@structural_rule("sharding_constraint")
def _sharding_constraint(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    (value,) = inputs
    value = value.replace(w=bind(eqn, value.w)[0])
    sharding = eqn.params.get("sharding")
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return [value]  # only W0 is constrained; the factors go where the compiler wants them
    by_label = dict(zip(value.w_labels, [*sharding.spec, *[None] * len(value.shape)], strict=False))

    def constrain(factor: jax.Array, labels: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        spec = jax.sharding.PartitionSpec(*(by_label.get(label) for label in labels))
        named = jax.sharding.NamedSharding(sharding.mesh, spec)
        return lax.with_sharding_constraint(factor, named), labels

    return [value.on_factors(constrain)]


# -----------------------------------------------------------------------------------------------
# Other axes
# -----------------------------------------------------------------------------------------------


@structural_rule("transpose")
def _transpose(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    return [lowrank.transpose(inputs[0], eqn.params["permutation"])]


@structural_rule("reshape")
def _reshape(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    if eqn.params.get("dimensions") is not None:
        return None
    return _one(lowrank.reshape(inputs[0], eqn.outvars[0].aval.shape))


@structural_rule("squeeze")
def _squeeze(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    axes = [axis % len(inputs[0].shape) for axis in eqn.params["dimensions"]]
    return [lowrank.squeeze(inputs[0], axes)]


@structural_rule("broadcast_in_dim")
def _broadcast(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    shape, axes = eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    return _one(lowrank.expand(inputs[0], shape, axes))


@structural_rule("slice")
def _slice(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    value = inputs[0]
    strides = eqn.params["strides"] or (1,) * len(value.shape)
    bounds = zip(eqn.params["start_indices"], eqn.params["limit_indices"], strides, strict=True)
    for axis, (start, limit, stride) in enumerate(bounds):
        if (start, limit, stride) != (0, value.shape[axis], 1):
            value = _sliced(value, axis, _slice_of(start, limit, stride), start)
            if value is None:
                return None
    return [value]


def _slice_of(start: int, limit: int, stride: int) -> Callable[[jax.Array, int], jax.Array]:
    return lambda array, axis: lax.slice_in_dim(array, start, limit, stride, axis)


def _sliced(value: LowRank, axis: int, operation: Any, start: Any) -> LowRank | None:
    stacked = value.side(value.w_labels[axis]) == (True, True)
    if stacked and value.key is not None:  # another layer drops other inputs
        value = value.replace(key=jax.random.fold_in(value.key, start))
    return lowrank.along_axis(value, axis, operation)


@structural_rule("dynamic_slice")
def _dynamic_slice(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    value, *starts = inputs
    if not is_lowrank(value) or any(map(is_lowrank, starts)):
        return None
    for axis, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        if size != value.shape[axis]:
            value = _sliced(value, axis, _dynamic_slice_of(start, size), start)
            if value is None:
                return None
    return [value]


def _dynamic_slice_of(start: Any, size: int) -> Callable[[jax.Array, int], jax.Array]:
    # The primitive counts no start from the end: it moves one that is out of range to the nearest.
    return lambda array, axis: lax.dynamic_slice_in_dim(
        array, start, size, axis, allow_negative_indices=False
    )


@structural_rule("split")
def _split(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    pieces, start = [], 0
    for size in map(int, eqn.params["sizes"]):
        take = _slice_of(start, start + size, 1)
        pieces.append(_sliced(inputs[0], eqn.params["axis"], take, start))
        start += size
    return None if any(piece is None for piece in pieces) else pieces


@structural_rule("rev")
def _reverse(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    value = inputs[0]
    for axis in eqn.params["dimensions"]:
        value = lowrank.along_axis(value, axis, lambda array, axis: lax.rev(array, [axis]))
        if value is None:
            return None
    return [value]


# -----------------------------------------------------------------------------------------------
# Other numbers
# -----------------------------------------------------------------------------------------------


@structural_rule("neg")
def _negate(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    if inputs[0].bias is not None:
        return None
    return [inputs[0].replace(w=bind(eqn, inputs[0].w)[0], scale=-inputs[0].scale)]


@structural_rule("mul")
def _multiply(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    if all(map(is_lowrank, inputs)):
        return None
    value, other = inputs if is_lowrank(inputs[0]) else inputs[::-1]
    return _scaled(eqn, value, other, inputs, inverse=False)


@structural_rule("div")
def _divide(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    value, other = inputs
    if not is_lowrank(value) or is_lowrank(other):
        return None
    return _scaled(eqn, value, other, inputs, inverse=True)


def _scaled(eqn: Any, value: LowRank, other: Any, inputs: list[Value], *, inverse: bool) -> Outputs:
    if eqn.outvars[0].aval.shape != value.shape or value.bias is not None:
        return None  # the multiplication repeats the weight, or is none of the layer's own
    w = bind(eqn, *(each.w if is_lowrank(each) else each for each in inputs))[0]
    constant = _constant(eqn, other)
    if constant is not None:
        factor = (1.0 / constant if constant else math.inf) if inverse else constant
        if math.isfinite(factor):
            return [value.replace(w=w, scale=value.scale * factor)]
    other = jnp.asarray(other)
    varying = [axis for axis in range(other.ndim) if other.shape[axis] != 1]
    kept = lax.squeeze(other, [axis for axis in range(other.ndim) if axis not in varying])
    wide = kept.astype(lowrank.accumulation_dtype(kept.dtype))
    return _one(lowrank.multiply(value, w, 1.0 / wide if inverse else wide, varying))


def _constant(eqn: Any, other: Any) -> float | None:
    """Return a scalar written into the program as a number, or None."""
    literal = any(isinstance(var, jex_core.Literal) and var.val is other for var in eqn.invars)
    return float(other) if literal and jnp.ndim(other) == 0 else None


@structural_rule("add", "sub")
def _add(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    if all(map(is_lowrank, inputs)):
        return None
    value = inputs[0] if is_lowrank(inputs[0]) else inputs[1]
    beside = value.gain is not None or value.bias is not None
    if eqn.outvars[0].aval.shape != value.shape or beside:
        return None  # what is added is not multiplied by the gain
    w = bind(eqn, *(each.w if is_lowrank(each) else each for each in inputs))[0]
    subtracted = eqn.primitive.name == "sub" and is_lowrank(inputs[1])
    return [value.replace(w=w, scale=-value.scale if subtracted else value.scale)]


def _one(value: LowRank | None) -> Outputs:
    return None if value is None else [value]
