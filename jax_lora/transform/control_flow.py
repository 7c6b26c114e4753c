"""Rebuild jit, remat, scan, while, cond and shard_map around the evaluation of their bodies.

Factors become additional inputs of the rebuilt equation.
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

from jax_lora.algebra.base_weight import Recipe, as_array
from jax_lora.algebra.low_rank import LowRank, is_low_rank
from jax_lora.algebra.named_array import NamedArray
from jax_lora.transform.programs import Body, Call, Cond, Scan, ShardMap, While

Value = Any  # an array or a LowRank
Evaluator = Any  # the `Evaluate` of the jaxpr that has the equation


# -----------------------------------------------------------------------------------------------
# jit, remat and plain calls
# -----------------------------------------------------------------------------------------------


def jit(evaluator: Evaluator, eqn: Any, program: Call, inputs: list[Value]) -> list[Value]:
    """Evaluate under `jax.jit`."""
    inputs = _constrained(inputs, eqn.params.get("in_shardings", ()))
    function = _jitted(
        type(evaluator),
        evaluator.settings,
        evaluator.strategy,
        evaluator.times,
        evaluator.locate(eqn),
        program.body.jaxpr,
        eqn.params.get("name", "jit"),
    )
    outputs = function(tuple(program.body.consts), tuple(inputs))
    return _constrained(outputs, eqn.params.get("out_shardings", ()))


@functools.lru_cache(maxsize=512)
def _jitted(
    evaluator: Any, settings: Any, strategy: Any, times: int, called_at: str, jaxpr: Any, name: str
) -> Callable[..., Any]:
    """Return the jitted evaluation of a jaxpr: the same function each time, to compile once."""

    def evaluate(consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        return evaluator(settings, strategy, times, called_at).run(Body(jaxpr, consts), inputs)

    evaluate.__name__ = name
    return jax.jit(evaluate)


def _constrained(values: Sequence[Value], shardings: Sequence[Any]) -> list[Value]:
    """Apply the shardings of an inner jit to its arrays."""
    wanted = [*shardings, *[None] * (len(values) - len(shardings))]
    return [
        lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, NamedSharding) and not is_low_rank(value)
        else value
        for value, sharding in zip(values, wanted, strict=True)
    ]


def remat(evaluator: Evaluator, eqn: Any, program: Call, inputs: list[Value]) -> list[Value]:
    """Evaluate under `jax.checkpoint`, with the same policy."""
    run = lambda *values: evaluator.run(program.body, values)  # noqa: E731
    options = {"prevent_cse": eqn.params["prevent_cse"], "policy": eqn.params["policy"]}
    return jax.checkpoint(run, **options)(*inputs)


def call(evaluator: Evaluator, eqn: Any, program: Call, inputs: list[Value]) -> list[Value]:
    """Evaluate a plain call."""
    return evaluator.run(program.body, inputs)


# -----------------------------------------------------------------------------------------------
# scan
# -----------------------------------------------------------------------------------------------


def scan(evaluator: Evaluator, eqn: Any, program: Scan, inputs: list[Value]) -> list[Value]:
    """Evaluate under `lax.scan`: factors with the stack axis are sliced together with W0."""
    n_carry = program.n_carry
    consts, initial, xs = program.split(inputs)
    dense = functools.partial(evaluator.dense, eqn=eqn, operation="scan carry")
    carry = _Carry(dense, initial, program.unchanged)
    xs = [value if _is_sliceable(value) else evaluator.dense([value], eqn)[0] for value in xs]
    slices = [_StackSlices(value) for value in xs]

    def step(carried: list[Any], x: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        index, arrays = x
        layer = [each.at(array) for each, array in zip(slices, arrays, strict=True)]
        values = [_keyed(value, index) for value in (*consts, *carry.values(carried), *layer)]
        outputs = evaluator.run(program.body, values, times=program.length)
        # Matrices that the body returns stay factored; a single row is smaller materialized.
        ys = [
            out if _is_stackable(out) else evaluator.dense([out], eqn)[0]
            for out in outputs[n_carry:]
        ]
        return carry.carried(outputs[:n_carry]), ys

    steps = jnp.arange(program.length) if any(map(_has_key, inputs)) else None
    final, ys = lax.scan(
        step,
        carry.carried(initial),
        (steps, [each.arrays for each in slices]),
        length=program.length,
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry.values(final), *(_stacked(value, inputs) for value in ys)]


def _is_stackable(value: Value) -> bool:
    return is_low_rank(value) and value.is_matrix and not isinstance(value.base, Recipe)


def _stacked(value: Value, inputs: Sequence[Value]) -> Value:
    """Add the name of the leading stack axis to a value whose arrays a scan has stacked."""
    if not is_low_rank(value):
        return value
    used = {*value.axes}.union(*(each.axes for each in value.named_arrays.values()))
    name = next(each for n in itertools.count() if (each := ("scan", n)) not in used)
    # The scan stacked the keys of the steps as well; they are derived again from the initial key.
    keys = (each.key for each in inputs if _has_key(each) and each.path == value.path)
    stacked = value.on_factors(lambda each: NamedArray(each.array, (name, *each.axes)))
    return stacked.replace(key=next(keys, None), axes=(name, *value.axes))


class _Carry:
    """The carry of a loop. Low-rank values that the body returns unchanged stay outside of it."""

    def __init__(self, dense: Callable[..., list[Any]], initial: Any, unchanged: Sequence[bool]):
        self._dense = dense
        self._fixed = [
            value if is_low_rank(value) and same else None
            for value, same in zip(initial, unchanged, strict=True)
        ]

    def carried(self, values: Sequence[Value]) -> list[Any]:
        """Return the values that the loop carries, as arrays."""
        pairs = zip(values, self._fixed, strict=True)
        return self._dense([value for value, fixed in pairs if fixed is None])

    def values(self, carried: Sequence[Any]) -> list[Value]:
        """Return all values of the carry: the inverse of `carried`."""
        rest = iter(carried)
        return [next(rest) if fixed is None else fixed for fixed in self._fixed]


def _is_sliceable(value: Value) -> bool:
    """Tell whether a scan can slice a value: not along input axes if it has an addend."""
    return not is_low_rank(value) or not value.addend or value.axes[0] in value.addend.axes


def _has_key(value: Value) -> bool:
    return is_low_rank(value) and value.key is not None


def _keyed(value: Value, index: Any) -> Value:
    """Derive the dropout key of a step."""
    if not _has_key(value):
        return value
    return value.replace(key=jax.random.fold_in(value.key, index))


class _StackSlices:
    """One scanned input: its arrays with the scanned axis first, and the value of one step."""

    def __init__(self, value: Value):
        if is_low_rank(value) and isinstance(value.base, Recipe) and not value.base.sliceable:
            value = value.replace(base=as_array(value.base))
        self._value = self.arrays = value
        if is_low_rank(value):
            name = value.axes[0]
            base = value.base.arrays if isinstance(value.base, Recipe) else value.base
            factors = {
                field: jnp.moveaxis(factor.array, factor.axes.index(name), 0)
                for field, factor in value.named_arrays.items()
                if name in factor.axes
            }
            self.arrays = (base, factors)

    def at(self, arrays: Any) -> Value:
        """Return the value of one step, given its slices."""
        value = self._value
        if not is_low_rank(value):
            return arrays
        (base, slices), name = arrays, value.axes[0]
        factors = {
            field: NamedArray(array, tuple(x for x in getattr(value, field).axes if x != name))
            for field, array in slices.items()
        }
        base = value.base.at(base) if isinstance(value.base, Recipe) else base
        return value.replace(**factors, base=base, axes=value.axes[1:])


# -----------------------------------------------------------------------------------------------
# while and cond
# -----------------------------------------------------------------------------------------------


def while_loop(evaluator: Evaluator, eqn: Any, program: While, inputs: list[Value]) -> list[Value]:
    """Evaluate under `lax.while_loop`."""
    for_test, for_body, initial = program.split(inputs)
    dense = functools.partial(evaluator.dense, eqn=eqn, operation="while carry")
    carry = _Carry(dense, initial, program.unchanged)

    def keep_going(state: tuple[Any, list[Any]]) -> Any:
        return evaluator.run(program.test, [*for_test, *carry.values(state[1])])[0]

    def step(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        index, carried = state
        values = [_keyed(value, index) for value in (*for_body, *carry.values(carried))]
        outputs = evaluator.run(program.body, values)
        return None if index is None else index + 1, carry.carried(outputs)

    start = jnp.zeros((), jnp.int32) if any(map(_has_key, inputs)) else None
    _, final = lax.while_loop(keep_going, step, (start, carry.carried(initial)))
    return carry.values(final)


def cond(evaluator: Evaluator, eqn: Any, program: Cond, inputs: list[Value]) -> list[Value]:
    """Evaluate under `lax.switch`."""
    index, *operands = inputs

    def branch(body: Body) -> Callable[..., list[Any]]:
        return lambda *values: evaluator.dense(evaluator.run(body, values), eqn, "cond output")

    return lax.switch(index, [branch(body) for body in program.branches], *operands)


# -----------------------------------------------------------------------------------------------
# shard_map
# -----------------------------------------------------------------------------------------------


def shard_map(
    evaluator: Evaluator, eqn: Any, program: ShardMap, inputs: list[Value]
) -> list[Value]:
    """Evaluate under `jax.shard_map`, with factors sharded like W0."""
    folds = evaluator.varying_axes(program, [_has_key(value) for value in inputs])

    def evaluate(*values: Value) -> tuple[Any, ...]:
        values = tuple(map(_keyed_by_shard, values, folds))
        outputs = evaluator.run(program.body, values)
        return tuple(evaluator.dense(outputs, eqn, "shard_map output"))

    inputs = [
        _shardable(evaluator, eqn, *each) for each in zip(inputs, program.in_specs, strict=True)
    ]
    in_specs = tuple(
        _spec_of(value, spec) if is_low_rank(value) else spec
        for value, spec in zip(inputs, program.in_specs, strict=True)
    )
    mapped = jax.shard_map(
        evaluate,
        mesh=program.mesh,
        in_specs=in_specs,
        out_specs=program.out_specs,
        axis_names=program.axis_names,
        check_vma=program.check_vma,
    )
    return list(mapped(*inputs))


def _keyed_by_shard(value: Value, axes: Collection[str]) -> Value:
    """Derive a different dropout key on every shard with different data."""
    for axis in sorted(axes):
        value = value.replace(key=jax.random.fold_in(value.key, lax.axis_index(axis)))
    return value


def _shardable(evaluator: Evaluator, eqn: Any, value: Value, spec: PartitionSpec) -> Value:
    """Return a value whose factors can be sharded like W0."""
    if not is_low_rank(value):
        return value
    axes = zip(spec, value.axes, strict=False)
    if value.addend is not None and any(
        names and name not in value.addend.axes for names, name in axes
    ):
        # Each shard would add the addend to a partial sum over the inputs.
        return evaluator.dense([value], eqn)[0]
    return value.replace(base=as_array(value.base))


def _spec_of(value: LowRank, spec: PartitionSpec) -> LowRank:
    """Shard the axes of factors like the axes of W0 with the same names."""
    by_name = dict(zip(value.axes, [*spec, *[None] * len(value.shape)], strict=False))
    along = lambda axes: PartitionSpec(*(by_name.get(name) for name in axes))  # noqa: E731
    key = None if value.key is None else PartitionSpec()
    specs = value.on_factors(lambda each: NamedArray(along(each.axes), each.axes))
    return specs.replace(base=spec, key=key)
