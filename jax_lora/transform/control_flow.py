"""Rebuild jit, remat, scan, while, cond and shard_map around the evaluation of their bodies.

Factors become additional inputs of the rebuilt equation.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_lora.algebra.base_weight import Recipe, as_array
from jax_lora.algebra.low_rank import LowRank, is_low_rank
from jax_lora.algebra.named_array import NamedArray
from jax_lora.transform.programs import Body, Cond, Scan, ShardMap, While

if TYPE_CHECKING:
    from jax_lora.transform.evaluate import Evaluate

Value = Any  # an array or a LowRank


def jit(evaluator: Evaluate, eqn: Any, program: Body, inputs: list[Value]) -> list[Value]:
    """Evaluate under `jax.jit`."""
    inputs = _constrained(inputs, eqn.params.get("in_shardings", ()))
    context = (evaluator.settings, evaluator.strategy, evaluator.times, evaluator.locate(eqn))
    name = eqn.params.get("name", "jit")
    function = _jitted(type(evaluator), context, program.jaxpr, name)
    outputs = function(tuple(program.consts), tuple(inputs))
    return _constrained(outputs, eqn.params.get("out_shardings", ()))


@functools.lru_cache(maxsize=512)
def _jitted(
    evaluator: type[Evaluate], context: tuple[Any, ...], jaxpr: Any, name: str
) -> Callable[..., Any]:
    """Return the jitted evaluation of a jaxpr: the same function each time, to compile once."""

    def evaluate(consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        return evaluator(*context).run(Body(jaxpr, consts), inputs)

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


def remat(evaluator: Evaluate, eqn: Any, program: Body, inputs: list[Value]) -> list[Value]:
    """Evaluate under `jax.checkpoint`, with the same policy."""
    run = lambda *values: evaluator.run(program, values)  # noqa: E731
    options = {"prevent_cse": eqn.params["prevent_cse"], "policy": eqn.params["policy"]}
    return jax.checkpoint(run, **options)(*inputs)


def call(evaluator: Evaluate, eqn: Any, program: Body, inputs: list[Value]) -> list[Value]:
    """Evaluate a plain call."""
    return evaluator.run(program, inputs)


def scan(evaluator: Evaluate, eqn: Any, program: Scan, inputs: list[Value]) -> list[Value]:
    """Evaluate under `lax.scan`: factors with the stack axis are sliced together with W0."""
    n_carry = program.n_carry
    consts, initial, xs = program.split(inputs)
    dense = functools.partial(evaluator.dense, eqn=eqn, operation="scan carry")
    carry = _Carry(dense, initial, program.unchanged)
    slices = list(map(_slices, evaluator.dense(xs, eqn, keep=_is_sliceable)))

    def step(carried: list[Any], x: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        index, arrays = x
        layer = [value_of(each) for (_, value_of), each in zip(slices, arrays, strict=True)]
        values = [_keyed(value, index) for value in (*consts, *carry.values(carried), *layer)]
        outputs = evaluator.run(program.body, values, times=program.length)
        # Matrices that the body returns stay factored; a single row is smaller materialized.
        ys = evaluator.dense(outputs[n_carry:], eqn, keep=_is_stackable)
        return carry.carried(outputs[:n_carry]), ys

    steps = jnp.arange(program.length) if any(map(_has_key, inputs)) else None
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    scanned = (steps, [arrays for arrays, _ in slices])
    final, ys = lax.scan(step, carry.carried(initial), scanned, **options)
    return [*carry.values(final), *(_stacked(value, inputs) for value in ys)]


def _is_stackable(value: LowRank) -> bool:
    return value.is_matrix and not isinstance(value.base, Recipe)


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


def _is_sliceable(value: LowRank) -> bool:
    """Tell whether a scan can slice a value: not along input axes if it has an addend."""
    return not value.addend or value.axes[0] in value.addend.axes


def _has_key(value: Value) -> bool:
    return is_low_rank(value) and value.key is not None


def _keyed(value: Value, index: Any) -> Value:
    """Derive the dropout key of a step."""
    if not _has_key(value):
        return value
    return value.replace(key=jax.random.fold_in(value.key, index))


def _slices(value: Value) -> tuple[Any, Callable[[Any], Value]]:
    """Return the arrays of a scanned input, with the scanned axis first.

    The second result is a function from the slices of one step to the value of the step.
    """
    if not is_low_rank(value):
        return value, lambda array: array
    if isinstance(value.base, Recipe) and not value.base.sliceable:
        value = value.replace(base=as_array(value.base))
    recipe, name = isinstance(value.base, Recipe), value.axes[0]
    factors = {
        field: jnp.moveaxis(factor.array, factor.axes.index(name), 0)
        for field, factor in value.named_arrays.items()
        if name in factor.axes
    }

    def at(arrays: Any) -> Value:
        base, slices = arrays
        factors = {
            field: NamedArray(array, tuple(x for x in getattr(value, field).axes if x != name))
            for field, array in slices.items()
        }
        base = value.base.at(base) if recipe else base
        return value.replace(**factors, base=base, axes=value.axes[1:])

    return (value.base.arrays if recipe else value.base, factors), at


def while_loop(evaluator: Evaluate, eqn: Any, program: While, inputs: list[Value]) -> list[Value]:
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


def cond(evaluator: Evaluate, eqn: Any, program: Cond, inputs: list[Value]) -> list[Value]:
    """Evaluate under `lax.switch`."""
    index, *operands = inputs

    def branch(body: Body) -> Callable[..., list[Any]]:
        return lambda *values: evaluator.dense(evaluator.run(body, values), eqn, "cond output")

    return lax.switch(index, [branch(body) for body in program.branches], *operands)


def shard_map(evaluator: Evaluate, eqn: Any, program: ShardMap, inputs: list[Value]) -> list[Value]:
    """Evaluate under `jax.shard_map`, with factors sharded like W0."""
    folds = evaluator.varying_axes(program, [_has_key(value) for value in inputs])

    def evaluate(*values: Value) -> tuple[Any, ...]:
        values = tuple(map(_keyed_by_shard, values, folds))
        outputs = evaluator.run(program.body, values)
        return tuple(evaluator.dense(outputs, eqn, "shard_map output"))

    shardable = functools.partial(_shardable, evaluator, eqn)
    inputs = list(map(shardable, inputs, program.in_specs))
    in_specs = tuple(map(_spec_of, inputs, program.in_specs))
    options = {name: eqn.params[name] for name in ("mesh", "out_specs", "check_vma")}
    options |= {"in_specs": in_specs, "axis_names": program.axis_names}
    return list(jax.shard_map(evaluate, **options)(*inputs))


def _keyed_by_shard(value: Value, axes: Collection[str]) -> Value:
    """Derive a different dropout key on every shard with different data."""
    for axis in sorted(axes):
        value = value.replace(key=jax.random.fold_in(value.key, lax.axis_index(axis)))
    return value


def _shardable(evaluator: Evaluate, eqn: Any, value: Value, spec: PartitionSpec) -> Value:
    """Return a value whose factors can be sharded like W0."""
    if not is_low_rank(value):
        return value
    sharded = [name for names, name in zip(spec, value.axes, strict=False) if names]
    if value.addend is not None and not {*sharded} <= {*value.addend.axes}:
        # Each shard would add the addend to a partial sum over the inputs.
        return evaluator.dense([value], eqn)[0]
    return value.replace(base=as_array(value.base))


def _spec_of(value: Value, spec: PartitionSpec) -> Any:
    """Shard the axes of factors like the axes of W0 with the same names."""
    if not is_low_rank(value):
        return spec
    by_name = dict(zip(value.axes, spec, strict=False))
    along = lambda axes: PartitionSpec(*(by_name.get(name) for name in axes))  # noqa: E731
    key = None if value.key is None else PartitionSpec()
    specs = value.on_factors(lambda each: NamedArray(along(each.axes), each.axes))
    return specs.replace(base=spec, key=key)
