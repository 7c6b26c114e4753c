"""Rules for operations that hold a program: they are entered, and written again around it.

jit, remat, scan, while, cond and shard_map come out as themselves, with the factors beside W0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_lora.lowrank import FACTORS, LowRank
from jax_lora.transform import varying
from jax_lora.transform.interpreter import Interpreter, Rule, Value, is_lowrank, opened, rule
from jax_lora.transform.layout import scan_layout
from jax_lora.transform.sites import Settings

Outputs = list[Value] | None


def _reads(*names: str) -> Callable[[Rule], Rule]:
    """Let a rule pass on an equation without the parameters that it reads: JAX may rename them."""

    def decorate(function: Rule) -> Rule:
        @functools.wraps(function)
        def guarded(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
            return function(interpreter, eqn, inputs) if set(names) <= set(eqn.params) else None

        return guarded

    return decorate


# -----------------------------------------------------------------------------------------------
# jit, remat and plain calls
# -----------------------------------------------------------------------------------------------


@rule("jit", "pjit")
@_reads("jaxpr")
def _jit(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    jaxpr, consts = opened(eqn.params["jaxpr"])
    inputs = [interpreter.fresh(value) for value in inputs]
    inputs = _constrained(inputs, eqn.params.get("in_shardings", ()))
    name, where = eqn.params.get("name", "jit"), interpreter.locate(eqn)
    function = _jitted(jaxpr, name, interpreter.settings, interpreter.times, where)
    outputs = function(tuple(consts), tuple(inputs))
    return _constrained(outputs, eqn.params.get("out_shardings", ()))


@functools.lru_cache(maxsize=512)
def _jitted(
    jaxpr: Any, name: str, settings: Settings, times: int, called_at: str
) -> Callable[..., Any]:
    """Return the jitted evaluation of a program: the same one again, so that it compiles once."""

    def evaluate(consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        return Interpreter(settings, times, called_at).evaluate(jaxpr, consts, inputs)

    evaluate.__name__ = name
    return jax.jit(evaluate)


def _constrained(values: Sequence[Value], shardings: Sequence[Any]) -> list[Value]:
    """Put an inner jit's own shardings on its arrays."""
    wanted = [*shardings, *[None] * (len(values) - len(shardings))]
    return [
        lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, NamedSharding) and not is_lowrank(value)
        else value
        for value, sharding in zip(values, wanted, strict=True)
    ]


@rule("checkpoint", "remat", "remat2")
@_reads("jaxpr", "prevent_cse", "policy")
def _remat(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    jaxpr, consts = opened(eqn.params["jaxpr"])
    inputs = [interpreter.fresh(value) for value in inputs]

    def evaluate(*values: Value) -> list[Value]:
        return interpreter.inner().evaluate(jaxpr, consts, values)

    options = {"prevent_cse": eqn.params["prevent_cse"], "policy": eqn.params["policy"]}
    return jax.checkpoint(evaluate, **options)(*inputs)


@rule("closed_call", "core_call")
def _call(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    program = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    if program is None:
        return None
    jaxpr, consts = opened(program)
    inputs = [interpreter.fresh(value) for value in inputs]
    return interpreter.inner().evaluate(jaxpr, consts, inputs)


# -----------------------------------------------------------------------------------------------
# scan
# -----------------------------------------------------------------------------------------------


@rule("scan")
@_reads("jaxpr", "length", "reverse", "unroll")
def _scan(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    layout = scan_layout(eqn)
    if layout is None:
        return None
    body, body_consts = opened(eqn.params["jaxpr"])
    n_consts, n_carry = layout
    inputs = [interpreter.fresh(value) for value in inputs]
    consts, carry, xs = (
        inputs[:n_consts],
        inputs[n_consts : n_consts + n_carry],
        inputs[n_consts + n_carry :],
    )
    still = _invariant(body, carry, n_consts)
    moving = interpreter.dense(
        [value for value, fixed in zip(carry, still, strict=True) if not fixed], eqn, "scan carry"
    )
    xs = [value if _is_sliceable(value) else interpreter.dense([value], eqn)[0] for value in xs]
    slices = [_StackSlices.of(value) for value in xs]

    def step(moving: list[Any], x: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        index, arrays = x
        layer = [each.at(array) for each, array in zip(slices, arrays, strict=True)]
        values = [*consts, *_interleave(carry, moving, still), *layer]
        values = [_keyed(value, index) for value in values]
        inner = interpreter.inner(eqn.params["length"])
        outputs = inner.evaluate(body, body_consts, values)
        new_carry = [out for out, fixed in zip(outputs[:n_carry], still, strict=True) if not fixed]
        # Whole kernels that the body hands out stay in factors; a row of one is smaller formed.
        ys = [
            out if is_lowrank(out) and out.is_matrix else interpreter.dense([out], eqn)[0]
            for out in outputs[n_carry:]
        ]
        return interpreter.dense(new_carry, eqn, "scan carry"), ys

    length = eqn.params["length"]
    steps = jnp.arange(length) if any(map(_has_key, inputs)) else None
    moved, ys = lax.scan(
        step,
        moving,
        (steps, [each.arrays for each in slices]),
        length=length,
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*_interleave(carry, moved, still), *(_stacked(value, inputs) for value in ys)]


def _stacked(value: Value, inputs: Sequence[Value]) -> Value:
    """View a value whose arrays the scan has stacked as one with a stack axis in front."""
    if not is_lowrank(value):
        return value
    taken = {*value.w_labels, *value.a_labels, *value.b_labels}
    label = next(each for n in itertools.count() if (each := ("scan", n)) not in taken)
    # The keys of the steps were stacked as well; each step's is folded in again where it is used.
    keys = (each.key for each in inputs if _has_key(each) and each.path == value.path)
    stacked = value.on_factors(lambda factor, labels: (factor, (label, *labels)))
    return stacked.replace(key=next(keys, None), w_labels=(label, *value.w_labels))


def _invariant(body: Any, carry: Sequence[Value], n_consts: int) -> list[bool]:
    """Tell which low-rank carries the body hands on untouched: constants under another name."""
    return [
        is_lowrank(value) and body.outvars[i] is body.invars[n_consts + i]
        for i, value in enumerate(carry)
    ]


def _interleave(carry: Sequence[Value], moving: Sequence[Any], still: Sequence[bool]) -> list:
    moved = iter(moving)
    return [value if fixed else next(moved) for value, fixed in zip(carry, still, strict=True)]


def _is_sliceable(value: Value) -> bool:
    """Tell whether a scan may take a value apart: not along the inputs that a bias is beside."""
    return not is_lowrank(value) or value.bias is None or value.w_labels[0] in value.bias_labels


def _has_key(value: Value) -> bool:
    return is_lowrank(value) and value.key is not None


def _keyed(value: Value, index: Any) -> Value:
    """Give a value with dropout the key of this step."""
    if not _has_key(value):
        return value
    return value.replace(key=jax.random.fold_in(value.key, index))


class _StackSlices:
    """One input that a scan slices: its arrays, and how to build the value of one step."""

    def __init__(self, value: Value, arrays: Any):
        self._value = value
        self.arrays = arrays

    @classmethod
    def of(cls, value: Value) -> _StackSlices:
        """Take the leading axis of W0 to the front of the factors that have it."""
        if not is_lowrank(value):
            return cls(value, value)
        label = value.w_labels[0]

        def leading(factor: Any, labels: tuple[Any, ...]) -> Any:
            return jnp.moveaxis(factor, labels.index(label), 0) if label in labels else None

        factors = [
            leading(getattr(value, each), getattr(value, f"{each}_labels")) for each in FACTORS
        ]
        return cls(value, (value.w, *factors))

    def at(self, arrays: Any) -> Value:
        """Build the value of one step from its slices."""
        value = self._value
        if not is_lowrank(value):
            return arrays
        w, *sliced = arrays
        held = [getattr(value, name) is not None for name in FACTORS]
        label, slices = value.w_labels[0], itertools.compress(sliced, held)

        def layer(factor: jax.Array, labels: tuple[Any, ...]) -> tuple[jax.Array, Any]:
            mine = next(slices)
            without = tuple(each for each in labels if each != label)
            return (factor, labels) if mine is None else (mine, without)

        return value.on_factors(layer).replace(w=w, w_labels=value.w_labels[1:])


# -----------------------------------------------------------------------------------------------
# while and cond
# -----------------------------------------------------------------------------------------------


@rule("while")
@_reads("cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts")
def _while(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    test, test_consts = opened(params["cond_jaxpr"])
    body, body_consts = opened(params["body_jaxpr"])
    inputs = [interpreter.fresh(value) for value in inputs]
    for_test, for_body = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
    carry = inputs[n_cond + n_body :]
    still = _invariant(body, carry, n_body)
    moving = interpreter.dense(
        [value for value, fixed in zip(carry, still, strict=True) if not fixed], eqn, "while carry"
    )

    def keep_going(state: tuple[Any, list[Any]]) -> Any:
        values = [*for_test, *_interleave(carry, state[1], still)]
        return interpreter.inner().evaluate(test, test_consts, values)[0]

    def step(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        index, moving = state
        values = [*for_body, *_interleave(carry, moving, still)]
        values = [_keyed(value, index) for value in values]
        outputs = interpreter.inner().evaluate(body, body_consts, values)
        outputs = [out for out, fixed in zip(outputs, still, strict=True) if not fixed]
        return (
            None if index is None else index + 1,
            interpreter.dense(outputs, eqn, "while carry"),
        )

    start = jnp.zeros((), jnp.int32) if any(map(_has_key, inputs)) else None
    _, moved = lax.while_loop(keep_going, step, (start, moving))
    return _interleave(carry, moved, still)


@rule("cond")
@_reads("branches")
def _cond(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    index, *operands = inputs
    operands = [interpreter.fresh(value) for value in operands]

    def branch(closed: Any) -> Callable[..., list[Any]]:
        jaxpr, consts = opened(closed)

        def evaluate(*values: Value) -> list[Any]:
            outputs = interpreter.inner().evaluate(jaxpr, consts, values)
            return interpreter.dense(outputs, eqn, "cond output")

        return evaluate

    return lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], *operands)


# -----------------------------------------------------------------------------------------------
# shard_map
# -----------------------------------------------------------------------------------------------


@rule("shard_map")
@_reads("mesh", "in_specs", "out_specs", "jaxpr", "check_vma")
def _shard_map(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> Outputs:
    params = eqn.params
    body, consts = opened(params["jaxpr"])
    inputs = [interpreter.fresh(value) for value in inputs]
    keyed = [_has_key(value) for value in inputs]
    folds = varying.axes_met(body, [varying.axes_of(spec) for spec in params["in_specs"]], keyed)

    def evaluate(*values: Value) -> tuple[Any, ...]:
        values = tuple(map(_keyed_by_shard, values, folds))
        outputs = interpreter.inner().evaluate(body, consts, values)
        return tuple(interpreter.dense(outputs, eqn, "shard_map output"))

    inputs = [
        interpreter.dense([value], eqn)[0] if _splits_bias(value, spec) else value
        for value, spec in zip(inputs, params["in_specs"], strict=True)
    ]
    in_specs = tuple(
        _spec_of(value, spec) if is_lowrank(value) else spec
        for value, spec in zip(inputs, params["in_specs"], strict=True)
    )
    mapped = jax.shard_map(
        evaluate,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=tuple(params["out_specs"]),
        axis_names=params.get("newly_manual_axes", params.get("manual_axes", frozenset())),
        check_vma=params["check_vma"],
    )
    return list(mapped(*inputs))


def _keyed_by_shard(value: Value, axes: Collection[str]) -> Value:
    """Give a value with dropout a key of its own on every shard whose data are its own."""
    for axis in sorted(axes):
        value = value.replace(key=jax.random.fold_in(value.key, lax.axis_index(axis)))
    return value


def _splits_bias(value: Value, spec: PartitionSpec) -> bool:
    """Tell whether shards would each add the bias to a sum over some of the inputs."""
    if not is_lowrank(value) or value.bias is None:
        return False
    axes = zip(spec, value.w_labels, strict=False)
    return any(names and label not in value.bias_labels for names, label in axes)


def _spec_of(value: LowRank, spec: PartitionSpec) -> LowRank:
    """Shard every factor's axis as W0's axis of the same label is sharded."""
    by_label = dict(zip(value.w_labels, [*spec, *[None] * len(value.shape)], strict=False))
    along = lambda labels: PartitionSpec(*(by_label.get(label) for label in labels))  # noqa: E731
    key = None if value.key is None else PartitionSpec()
    specs = value.on_factors(lambda _, labels: (along(labels), labels))
    return specs.replace(w=spec, key=key)
