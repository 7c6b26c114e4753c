"""Control flow for interpretations that propagate descriptions of values instead of arrays.

It mirrors control_flow.py, which rebuilds the same equations on arrays: values that are
materialized there are described as materialized here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeVar

from jax_lora.transform.programs import Body, Cond, Loop, Scan, ShardMap, While
from jax_lora.transform.rules import Rule
from jax_lora.transform.walker import Interpretation, walk

Value = TypeVar("Value")


class Abstract(Interpretation[Value], Protocol[Value]):
    """An interpretation of descriptions of values."""

    def inside(self, eqn: Any, times: int = 1) -> Self:
        """Return the interpretation of a sub-jaxpr that runs `times` times."""
        ...

    def unrecorded(self) -> Self:
        """Return an interpretation that records nothing, to find the fixed point of a loop."""
        ...

    def join(self, values: Sequence[Value]) -> Value:
        """Describe a value that is one of several."""
        ...

    def materialized(self, value: Value, eqn: Any, operation: str) -> Value:
        """Describe a value after materialization, if it is a weight."""
        ...

    def sliced(self, value: Value) -> Value:
        """Describe a slice along the first axis; by default like the array."""
        return value

    def stacked(self, value: Value, eqn: Any) -> Value:
        """Describe a stack of values along a new first axis; by default like one of them."""
        return value

    def enter(
        self, eqn: Any, rule: Rule, program: Any, inputs: Sequence[Value]
    ) -> list[Value] | None:
        """Interpret the sub-jaxprs of an equation."""
        return _ENTER[type(program)](self, eqn, program, inputs)

    def run(self, body: Body, inputs: Sequence[Value]) -> list[Value]:
        """Interpret a sub-jaxpr."""
        return walk(self, body, inputs)


def _call(here: Abstract, eqn: Any, program: Body, inputs: Sequence[Any]) -> list[Any]:
    return here.inside(eqn).run(program, inputs)


def _scan(here: Abstract, eqn: Any, program: Scan, inputs: Sequence[Any]) -> list[Any]:
    consts, carry, xs = program.split(inputs)
    xs = [here.sliced(value) for value in xs]
    step = lambda inner, carry: inner.run(program.body, [*consts, *carry, *xs])  # noqa: E731
    carry = _fixed_point(here, eqn, program, carry, step)
    outputs = step(here.inside(eqn, program.length), carry)
    stacked = [here.stacked(value, eqn) for value in outputs[program.n_carry :]]
    return [*_carried(here, eqn, program, outputs), *stacked]


def _while(here: Abstract, eqn: Any, program: While, inputs: Sequence[Any]) -> list[Any]:
    for_test, for_body, carry = program.split(inputs)
    step = lambda inner, carry: inner.run(program.body, [*for_body, *carry])  # noqa: E731
    carry = _fixed_point(here, eqn, program, carry, step)
    here.inside(eqn).run(program.test, [*for_test, *carry])
    return _carried(here, eqn, program, step(here.inside(eqn), carry))


def _carried(here: Abstract, eqn: Any, program: Loop, values: Sequence[Any]) -> list[Any]:
    """Describe the carry among the values: what the body returns unchanged is not materialized."""
    return [
        value if same else here.materialized(value, eqn, f"{eqn.primitive.name} carry")
        for value, same in zip(values[: program.n_carry], program.unchanged, strict=True)
    ]


def _fixed_point(
    here: Abstract, eqn: Any, program: Loop, carry: Sequence[Any], step: Callable[..., Any]
) -> list[Any]:
    """Join the initial carry with that of later iterations until it no longer changes."""
    carry = _carried(here, eqn, program, carry)
    while True:
        again = _carried(here, eqn, program, step(here.unrecorded(), carry))
        joined = [here.join(values) for values in zip(carry, again, strict=True)]
        if joined == carry:
            return carry
        carry = joined


def _cond(here: Abstract, eqn: Any, program: Cond, inputs: Sequence[Any]) -> list[Any]:
    results = [here.inside(eqn).run(branch, inputs[1:]) for branch in program.branches]
    return [
        here.join([here.materialized(value, eqn, "cond output") for value in outputs])
        for outputs in zip(*results, strict=True)
    ]


def _shard_map(here: Abstract, eqn: Any, program: ShardMap, inputs: Sequence[Any]) -> list[Any]:
    outputs = here.inside(eqn).run(program.body, inputs)
    return [here.materialized(value, eqn, "shard_map output") for value in outputs]


_ENTER: dict[type, Callable[..., list[Any]]] = {
    Body: _call,
    Scan: _scan,
    While: _while,
    Cond: _cond,
    ShardMap: _shard_map,
}
