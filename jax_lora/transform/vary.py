"""vary: the interpretation that propagates mesh axes, for dropout inside `shard_map`.

Shards with different data should have different dropout masks. Shards with equal data must have
equal masks, so that their results stay equal. The jaxpr determines which case applies: data varies
along the mesh axes that it is sharded over, and a sum or gather over an axis removes that axis. JAX
tracks this itself only under `check_vma`, where a kernel sharded over its outputs also makes its
data vary.

If the jaxpr does not determine it, data counts as equal: equal masks are correct for any data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax_lora.transform.abstract import Abstract
from jax_lora.transform.programs import Body, ShardMap
from jax_lora.transform.rules import Operand, Rule

Axes = frozenset[str]
NO_AXES: Axes = frozenset()

# Collectives with different results on every shard. Other collectives, such as sums and gathers,
# make data equal along their mesh axes.
_VARYING_RESULTS = frozenset(
    "axis_index ppermute all_to_all ragged_all_to_all reduce_scatter".split()
)


def axes_of(spec: Any) -> Axes:
    """Return the mesh axes that a `PartitionSpec` names."""
    return frozenset(name for entry in spec for name in _names(entry))


def axes_of_data(
    jaxpr: Any, inputs: Sequence[Axes], asked: Sequence[bool], consts: Sequence[Any] = ()
) -> list[Axes]:
    """Return, per input, the mesh axes along which all the data it is contracted with varies.

    `inputs` has the axes along which each input of the open jaxpr varies, and `asked` tells which
    inputs are weights. The result is empty for other inputs and for unused weights.
    """
    if not any(asked):
        return [NO_AXES] * len(inputs)
    variables = [
        _Variable(axes, frozenset({index} if is_weight else ()))
        for index, (axes, is_weight) in enumerate(zip(inputs, asked, strict=True))
    ]
    vary = Vary()
    vary.run(Body(jaxpr, consts), variables)
    return [vary.data_axes.get(index, NO_AXES) for index in range(len(inputs))]


@dataclasses.dataclass(frozen=True)
class _Variable:
    """A variable: the mesh axes along which it varies, and the weights that it stands for."""

    axes: Axes = NO_AXES
    weights: frozenset[int] = frozenset()


@dataclasses.dataclass(eq=False)
class Vary(Abstract[_Variable]):
    """Records the mesh axes along which the data of each weight varies."""

    data_axes: dict[int, Axes] = dataclasses.field(default_factory=dict)

    def inside(self, eqn: Any, times: int = 1) -> Vary:
        """Share the record."""
        return self

    def unrecorded(self) -> Vary:
        """Start an empty record."""
        return Vary()

    def constant(self, array: Any) -> _Variable:
        """Describe a constant: equal on every shard."""
        return _Variable()

    def concerns(self, inputs: Sequence[_Variable]) -> bool:
        """Interpret every equation: all data can vary."""
        return True

    def move(self, eqn: Any, rule: Rule, inputs: Sequence[_Variable]) -> list[_Variable] | None:
        """Propagate weights as long as they are matrices."""
        moves = rule.read is None or _is_choice_of_kernels(eqn, rule)
        # Operands of a rule with `each` are independent.
        return self._outputs(eqn, inputs, independent=rule.each, weights=moves)

    def consume(
        self, eqns: Sequence[Any], rule: Rule, inputs: Sequence[Sequence[_Variable]]
    ) -> list[list[_Variable] | None]:
        """Record the axes of the data that weights are contracted with."""
        results: list[list[_Variable] | None] = []
        for eqn, values in zip(eqns, inputs, strict=True):
            for index, value in enumerate(values):
                others = [other for i, other in enumerate(values) if i != index]
                self._contract(value.weights, self.join(others).axes)
            results.append([_Variable(self.join(values).axes)] * len(eqn.outvars))
        return results

    def without_rule(self, eqn: Any, inputs: Sequence[_Variable]) -> list[_Variable]:
        """Describe the outputs of any other operation, such as a collective."""
        # The leaves of a tree in a collective are independent.
        return self._outputs(eqn, inputs, independent=True, weights=False)

    def _outputs(
        self, eqn: Any, inputs: Sequence[_Variable], *, independent: bool, weights: bool
    ) -> list[_Variable]:
        if not independent or len(inputs) != len(eqn.outvars):
            inputs = [self.join(inputs)] * len(eqn.outvars)
        results = [dataclasses.replace(each, axes=_after(eqn, each.axes)) for each in inputs]
        return results if weights else [_Variable(each.axes) for each in results]

    def join(self, values: Sequence[_Variable]) -> _Variable:
        """Describe a value that is one of several: it varies wherever one of them does."""
        return _Variable(
            NO_AXES.union(*(value.axes for value in values)),
            frozenset().union(*(value.weights for value in values)),
        )

    def materialized(self, value: _Variable, eqn: Any, operation: str) -> _Variable:
        """Describe a materialized weight, to which dropout does not apply."""
        return _Variable(value.axes)

    def enter(
        self, eqn: Any, rule: Rule, program: Any, inputs: Sequence[_Variable]
    ) -> list[_Variable] | None:
        """Keep the axes of outer meshes only: an inner shard_map handles its own axes."""
        if not isinstance(program, ShardMap):
            return super().enter(eqn, rule, program, inputs)
        inner = Vary()
        sharded = [
            _Variable(value.axes | axes_of(spec), value.weights)
            for value, spec in zip(inputs, program.in_specs, strict=True)
        ]
        outputs = inner.run(program.body, sharded)
        for weight, axes in inner.data_axes.items():
            self._contract((weight,), axes - program.axis_names)
        return [_Variable(value.axes - program.axis_names) for value in outputs]

    def _contract(self, weights: Any, data: Axes) -> None:
        for weight in weights:
            self.data_axes[weight] = self.data_axes.get(weight, data) & data


def _is_choice_of_kernels(eqn: Any, rule: Rule) -> bool:
    """Tell whether a lookup selects kernels of a stack rather than rows of a table."""
    names = tuple(range(len(eqn.invars[0].aval.shape)))
    moves = rule.move(Operand(eqn, 0, names)) if rule.move is not None else None
    return moves is not None and sum(isinstance(name, int) for name in moves[0].axes) > 1


def _after(eqn: Any, axes: Axes) -> Axes:
    """Return the axes along which data varies after an operation, which may be a collective."""
    if eqn.params.get("axis_index_groups") is not None:
        return axes  # data becomes equal within each group only
    over = frozenset(_names(eqn.params.get("axes", eqn.params.get("axis_name"))))
    varies = eqn.primitive.name.removesuffix("_start") in _VARYING_RESULTS
    return axes | over if varies else axes - over


def _names(entry: Any) -> tuple[str, ...]:
    entries = entry if isinstance(entry, (tuple, list, frozenset, set)) else (entry,)
    return tuple(name for name in entries if isinstance(name, str))
