"""Control flow for interpretations that propagate descriptions of values instead of arrays.

It mirrors control_flow.py, which rebuilds the same equations on arrays: values that are
materialized there are described as materialized here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeVar

from jax_lora.transform.programs import Body, Call, Cond, Scan, ShardMap, While
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

    def into_shards(
        self, eqn: Any, program: ShardMap, inputs: Sequence[Value]
    ) -> tuple[Self, Sequence[Value]]:
        """Return the interpretation and the inputs of the body of a `shard_map`."""
        return self.inside(eqn), inputs

    def out_of_shards(self, inner: Any, program: ShardMap, outputs: Sequence[Value]) -> list[Value]:
        """Return the outputs of a `shard_map`, given those of its body."""
        return list(outputs)

    def enter(
        self, eqn: Any, rule: Rule, program: Any, inputs: Sequence[Value]
    ) -> list[Value] | None:
        """Interpret the sub-jaxprs of an equation."""
        return _ENTER[type(program)](self, eqn, program, inputs)

    def run(self, body: Body, inputs: Sequence[Value]) -> list[Value]:
        """Interpret a sub-jaxpr."""
        return walk(self, body.jaxpr, body.consts, inputs)


def _call(here: Abstract, eqn: Any, program: Call, inputs: Sequence[Any]) -> list[Any]:
    return here.inside(eqn).run(program.body, inputs)


def _scan(here: Abstract, eqn: Any, program: Scan, inputs: Sequence[Any]) -> list[Any]:
    consts, carry, xs = program.split(inputs)
    xs = [here.sliced(value) for value in xs]
    loop = _Loop(here, eqn, "scan carry", program.unchanged)
    step = lambda inner, carry: inner.run(program.body, [*consts, *carry, *xs])  # noqa: E731
    n_carry = program.n_carry
    carry = loop.fixed_point(carry, lambda carry: step(here.unrecorded(), carry)[:n_carry])
    outputs = step(here.inside(eqn, program.length), carry)
    stacked = [here.stacked(value, eqn) for value in outputs[n_carry:]]
    return [*loop.materialized(outputs[:n_carry]), *stacked]


def _while(here: Abstract, eqn: Any, program: While, inputs: Sequence[Any]) -> list[Any]:
    for_test, for_body, carry = program.split(inputs)
    loop = _Loop(here, eqn, "while carry", program.unchanged)
    step = lambda inner, carry: inner.run(program.body, [*for_body, *carry])  # noqa: E731
    carry = loop.fixed_point(carry, lambda carry: step(here.unrecorded(), carry))
    here.inside(eqn).run(program.test, [*for_test, *carry])
    return loop.materialized(step(here.inside(eqn), carry))


def _cond(here: Abstract, eqn: Any, program: Cond, inputs: Sequence[Any]) -> list[Any]:
    results = [here.inside(eqn).run(branch, inputs[1:]) for branch in program.branches]
    return [
        here.join([here.materialized(value, eqn, "cond output") for value in outputs])
        for outputs in zip(*results, strict=True)
    ]


def _shard_map(here: Abstract, eqn: Any, program: ShardMap, inputs: Sequence[Any]) -> list[Any]:
    inner, inputs = here.into_shards(eqn, program, inputs)
    outputs = inner.run(program.body, inputs)
    outputs = [here.materialized(value, eqn, "shard_map output") for value in outputs]
    return here.out_of_shards(inner, program, outputs)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The carry of a loop: values that the body returns unchanged keep their description."""

    here: Abstract
    eqn: Any
    name: str  # of the carry in messages
    unchanged: Sequence[bool]

    def materialized(self, values: Sequence[Any]) -> list[Any]:
        """Describe the carry after materialization of the values that change."""
        return [
            value if same else self.here.materialized(value, self.eqn, self.name)
            for value, same in zip(values, self.unchanged, strict=True)
        ]

    def fixed_point(
        self, carry: Sequence[Any], step: Callable[[list[Any]], Sequence[Any]]
    ) -> list[Any]:
        """Join the initial carry with that of later iterations until it no longer changes."""
        carry = self.materialized(carry)
        while True:
            again = self.materialized(step(carry))
            joined = [
                value if same else self.here.join([value, new])
                for value, new, same in zip(carry, again, self.unchanged, strict=True)
            ]
            if joined == carry:
                return carry
            carry = joined


_ENTER: dict[type, Callable[..., list[Any]]] = {
    Call: _call,
    Scan: _scan,
    While: _while,
    Cond: _cond,
    ShardMap: _shard_map,
}
