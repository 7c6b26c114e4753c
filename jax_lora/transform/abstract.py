"""Programs without arrays: how an interpretation that computes nothing goes through them.

The structure is that of control_flow.py, which builds the same programs again on arrays: what is
materialized there loses its names here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

from jax_lora.transform.programs import Body, Call, Cond, Scan, ShardMap, While, unchanged
from jax_lora.transform.rules import Rule
from jax_lora.transform.walker import Interpretation, walk

Value = TypeVar("Value")


class Abstract(Interpretation[Value]):
    """An interpretation on descriptions of values."""

    def inside(self, eqn: Any, times: int = 1) -> Self:
        """Return the interpretation for a program that runs so often inside this one."""
        raise NotImplementedError

    def unrecorded(self) -> Self:
        """Return one that forgets what it sees, for a first pass through a loop."""
        raise NotImplementedError

    def join(self, values: Sequence[Value]) -> Value:
        """Describe a value that is one of several."""
        raise NotImplementedError

    def sliced(self, value: Value) -> Value:
        """Describe a slice along the first axis."""
        raise NotImplementedError

    def stacked(self, value: Value, eqn: Any) -> Value:
        """Describe a stack of values along a new first axis."""
        raise NotImplementedError

    def materialized(self, value: Value, eqn: Any, operation: str) -> Value:
        """Describe the full weight of a value that is a weight."""
        raise NotImplementedError

    def into_shards(
        self, eqn: Any, program: ShardMap, inputs: Sequence[Value]
    ) -> tuple[Self, Sequence[Value]]:
        """Return the interpretation of what every shard runs, and its inputs."""
        raise NotImplementedError

    def out_of_shards(self, inner: Any, program: ShardMap, outputs: Sequence[Value]) -> list[Value]:
        """Return the outputs of all shards together."""
        raise NotImplementedError

    def enter(self, eqn: Any, rule: Rule, inputs: Sequence[Value]) -> list[Value] | None:
        """Go through the programs that an equation holds."""
        program = rule.open(eqn) if rule.open is not None else None
        return None if program is None else _ENTER[type(program)](self, eqn, program, inputs)

    def run(self, body: Body, inputs: Sequence[Value]) -> list[Value]:
        """Go through a program."""
        return walk(self, body.jaxpr, body.consts, inputs)


def _call(here: Abstract, eqn: Any, program: Call, inputs: Sequence[Any]) -> list[Any]:
    return here.inside(eqn).run(program.body, inputs)


def _scan(here: Abstract, eqn: Any, program: Scan, inputs: Sequence[Any]) -> list[Any]:
    consts, carry, xs = program.split(inputs)
    xs = [here.sliced(value) for value in xs]
    body, n_carry = program.body, program.n_carry
    loop = _Loop(here, eqn, "scan carry", unchanged(body, program.n_consts, n_carry))
    step = lambda inner, carry: inner.run(body, [*consts, *carry, *xs])  # noqa: E731
    carry = loop.settled(carry, lambda carry: step(here.unrecorded(), carry)[:n_carry])
    outputs = step(here.inside(eqn, program.length), carry)
    stacked = [here.stacked(value, eqn) for value in outputs[n_carry:]]
    return [*loop.materialized(outputs[:n_carry]), *stacked]


def _while(here: Abstract, eqn: Any, program: While, inputs: Sequence[Any]) -> list[Any]:
    for_test, for_body, carry = program.split(inputs)
    body = program.body
    loop = _Loop(here, eqn, "while carry", unchanged(body, program.n_body, len(carry)))
    carry = loop.settled(carry, lambda carry: here.unrecorded().run(body, [*for_body, *carry]))
    here.inside(eqn).run(program.test, [*for_test, *carry])
    return loop.materialized(here.inside(eqn).run(body, [*for_body, *carry]))


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


class _Loop:
    """The carry of a loop: what its body hands on untouched stays what it is."""

    def __init__(self, here: Abstract, eqn: Any, what: str, still: Sequence[bool]):
        self._here, self._eqn, self._what, self._still = here, eqn, what, still

    def materialized(self, values: Sequence[Any]) -> list[Any]:
        """Describe what becomes of the values of a carry."""
        return [
            value if fixed else self._here.materialized(value, self._eqn, self._what)
            for value, fixed in zip(values, self._still, strict=True)
        ]

    def settled(
        self, carry: Sequence[Any], step: Callable[[list[Any]], Sequence[Any]]
    ) -> list[Any]:
        """Join what goes into the loop with what comes round, until nothing changes."""
        carry = self.materialized(carry)
        while True:
            again = self.materialized(step(carry))
            joined = [
                value if fixed else self._here.join([value, new])
                for value, new, fixed in zip(carry, again, self._still, strict=True)
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
