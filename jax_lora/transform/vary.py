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
_MADE_DIFFERENT = frozenset(
    "axis_index ppermute all_to_all ragged_all_to_all reduce_scatter".split()
)


def axes_of(spec: Any) -> Axes:
    """Return the mesh axes that a `PartitionSpec` names."""
    return frozenset(name for entry in spec for name in _names(entry))


def axes_met(
    jaxpr: Any, inputs: Sequence[Axes], asked: Sequence[bool], consts: Sequence[Any] = ()
) -> list[Axes]:
    """Return, per weight, the mesh axes along which all the data it is contracted with varies.

    Args:
      jaxpr: The open jaxpr of the body of a `shard_map`.
      inputs: The axes along which each input varies.
      asked: Which inputs are the weights in question.
      consts: Constants of the jaxpr.

    Returns:
      The axes of each input; empty for other inputs and for unused weights.
    """
    if not any(asked):
        return [NO_AXES] * len(inputs)
    known = [
        _Known(axes, frozenset({index}) if is_weight else frozenset())
        for index, (axes, is_weight) in enumerate(zip(inputs, asked, strict=True))
    ]
    vary = Vary()
    vary.run(Body(jaxpr, consts), known)
    return [vary.met.get(index, NO_AXES) for index in range(len(inputs))]


@dataclasses.dataclass(frozen=True)
class _Known:
    """A variable: the mesh axes along which it varies, and the weights that it stands for."""

    axes: Axes = NO_AXES
    weights: frozenset[int] = frozenset()


_UNKNOWN = _Known()


class Vary(Abstract[_Known]):
    """Records the mesh axes along which the data of each weight varies."""

    def __init__(self) -> None:
        """Start with an empty record."""
        self.met: dict[int, Axes] = {}

    def inside(self, eqn: Any, times: int = 1) -> Vary:
        """Share the record."""
        return self

    def unrecorded(self) -> Vary:
        """Start an empty record."""
        return Vary()

    def constant(self, array: Any) -> _Known:
        """Describe a constant: equal on every shard."""
        return _UNKNOWN

    def concerns(self, inputs: Sequence[_Known]) -> bool:
        """Interpret every equation: all data can vary."""
        return True

    def plain(self, eqn: Any, inputs: Sequence[_Known]) -> list[_Known]:
        """Describe the outputs of an operation on data."""
        return self.without_rule(eqn, inputs)

    def move(self, eqn: Any, rule: Rule, inputs: Sequence[_Known]) -> list[_Known] | None:
        """Propagate weights as long as they are matrices."""
        count = len(eqn.outvars)
        # Operands of a rule with `each` are independent.
        outputs = (
            list(inputs) if rule.each and len(inputs) == count else [self.join(inputs)] * count
        )
        if rule.read is not None and not _is_choice_of_kernels(eqn, rule):
            outputs = [_Known(each.axes) for each in outputs]
        return [dataclasses.replace(each, axes=_after(eqn, each.axes)) for each in outputs]

    def consume(
        self, eqns: Sequence[Any], rule: Rule, inputs: Sequence[Sequence[_Known]]
    ) -> list[list[_Known] | None]:
        """Record the axes of the data that weights are contracted with."""
        results: list[list[_Known] | None] = []
        for eqn, values in zip(eqns, inputs, strict=True):
            for index, value in enumerate(values):
                others = [other for i, other in enumerate(values) if i != index]
                self._meet(value.weights, self.join(others).axes)
            results.append([_Known(self.join(values).axes)] * len(eqn.outvars))
        return results

    def without_rule(self, eqn: Any, inputs: Sequence[_Known]) -> list[_Known]:
        """Describe the outputs of any other operation, such as a collective."""
        count = len(eqn.outvars)
        # The leaves of a tree in a collective are independent.
        outputs = list(inputs) if len(inputs) == count else [self.join(inputs)] * count
        return [_Known(_after(eqn, each.axes)) for each in outputs]

    def join(self, values: Sequence[_Known]) -> _Known:
        """Describe a value that is one of several: it varies wherever one of them does."""
        return _Known(
            NO_AXES.union(*(value.axes for value in values)),
            frozenset().union(*(value.weights for value in values)),
        )

    def sliced(self, value: _Known) -> _Known:
        """Describe a slice like the array."""
        return value

    def stacked(self, value: _Known, eqn: Any) -> _Known:
        """Describe a stack like its slices."""
        return value

    def materialized(self, value: _Known, eqn: Any, operation: str) -> _Known:
        """Describe a materialized weight, to which dropout does not apply."""
        return _Known(value.axes)

    def into_shards(
        self, eqn: Any, program: ShardMap, inputs: Sequence[_Known]
    ) -> tuple[Vary, Sequence[_Known]]:
        """Start a record, with inputs that also vary along the axes they are sharded over."""
        differ = [
            dataclasses.replace(value, axes=value.axes | axes_of(spec))
            for value, spec in zip(inputs, program.in_specs, strict=True)
        ]
        return Vary(), differ

    def out_of_shards(
        self, inner: Any, program: ShardMap, outputs: Sequence[_Known]
    ) -> list[_Known]:
        """Keep the axes of outer meshes: the inner shard_map handles its own axes."""
        for weight, axes in inner.met.items():
            self._meet((weight,), axes - program.axis_names)
        return [
            dataclasses.replace(value, axes=value.axes - program.axis_names) for value in outputs
        ]

    def _meet(self, weights: Any, data: Axes) -> None:
        for weight in weights:
            self.met[weight] = self.met.get(weight, data) & data


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
    made_different = eqn.primitive.name.removesuffix("_start") in _MADE_DIFFERENT
    return axes | over if made_different else axes - over


def _names(entry: Any) -> tuple[str, ...]:
    entries = entry if isinstance(entry, (tuple, list, frozenset, set)) else (entry,)
    return tuple(name for name in entries if isinstance(name, str))
