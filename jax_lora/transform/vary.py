"""vary: the interpretation that follows the axes of a mesh, for dropout inside `shard_map`.

Every shard runs the same program. Shards with different data should drop different inputs, and
shards with the same data must drop the same ones, or what they compute would no longer be the same.
The program tells which is which: data differ along the axes that they are sharded by, and a sum or
a gather over an axis makes them the same again. JAX keeps a record of that only under `check_vma`,
and there a kernel that is sharded by its outputs marks its data as different.

Where the program does not tell, data count as the same: shards then drop alike, which is correct
for any data.
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

# What leaves different data on every shard. All else that runs over a mesh axis - sums, maxima,
# gathers - makes them the same along it.
_MADE_DIFFERENT = frozenset(
    "axis_index ppermute all_to_all ragged_all_to_all reduce_scatter".split()
)


def axes_of(spec: Any) -> Axes:
    """Return the mesh axes that a `PartitionSpec` names."""
    return frozenset(name for entry in spec for name in _names(entry))


def axes_met(
    jaxpr: Any, inputs: Sequence[Axes], asked: Sequence[bool], consts: Sequence[Any] = ()
) -> list[Axes]:
    """Return, per weight, the mesh axes along which all the data that it meets differ.

    Args:
      jaxpr: The open jaxpr that every shard runs.
      inputs: The axes along which each input of it differs.
      asked: Which inputs are weights to ask about.
      consts: Constants of the jaxpr.

    Returns:
      The axes of each input; none for an input that was not asked about, or meets nothing.
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
    """What is known of a variable: the axes along which it differs, and which weights it is."""

    axes: Axes = NO_AXES
    weights: frozenset[int] = frozenset()


_UNKNOWN = _Known()


class Vary(Abstract[_Known]):
    """Records along which axes the data that each weight meets differ."""

    def __init__(self) -> None:
        """Start with nothing met."""
        self.met: dict[int, Axes] = {}

    def inside(self, eqn: Any, times: int = 1) -> Vary:
        """Record in the same place."""
        return self

    def unrecorded(self) -> Vary:
        """Record elsewhere."""
        return Vary()

    def constant(self, array: Any) -> _Known:
        """Describe a constant: the same on every shard."""
        return _UNKNOWN

    def concerns(self, inputs: Sequence[_Known]) -> bool:
        """Follow every equation: data differ whether or not a weight is near."""
        return True

    def plain(self, eqn: Any, inputs: Sequence[_Known]) -> list[_Known]:
        """Describe the outputs of an operation on data."""
        return self.without_rule(eqn, inputs)

    def move(self, eqn: Any, rule: Rule, inputs: Sequence[_Known]) -> list[_Known] | None:
        """Hand weights on, as long as they are matrices."""
        count = len(eqn.outvars)
        # An operation on several arrays does each for itself.
        outputs = (
            list(inputs) if rule.each and len(inputs) == count else [self.join(inputs)] * count
        )
        if rule.read is not None and not _is_choice_of_kernels(eqn, rule):
            outputs = [_Known(each.axes) for each in outputs]
        return [dataclasses.replace(each, axes=_after(eqn, each.axes)) for each in outputs]

    def consume(
        self, eqns: Sequence[Any], rule: Rule, inputs: Sequence[Sequence[_Known]]
    ) -> list[list[_Known] | None]:
        """Record the axes of the data that weights meet."""
        results: list[list[_Known] | None] = []
        for eqn, values in zip(eqns, inputs, strict=True):
            for index, value in enumerate(values):
                others = [other for i, other in enumerate(values) if i != index]
                self._meet(value.weights, self.join(others).axes)
            results.append([_Known(self.join(values).axes)] * len(eqn.outvars))
        return results

    def without_rule(self, eqn: Any, inputs: Sequence[_Known]) -> list[_Known]:
        """Describe the outputs of any other operation, which may run over axes of the mesh."""
        count = len(eqn.outvars)
        # A sum of a tree does each of its leaves for itself.
        outputs = list(inputs) if len(inputs) == count else [self.join(inputs)] * count
        return [_Known(_after(eqn, each.axes)) for each in outputs]

    def join(self, values: Sequence[_Known]) -> _Known:
        """Describe a value that is one of several: it differs wherever one of them does."""
        return _Known(
            NO_AXES.union(*(value.axes for value in values)),
            frozenset().union(*(value.weights for value in values)),
        )

    def sliced(self, value: _Known) -> _Known:
        """Describe a slice like the whole."""
        return value

    def stacked(self, value: _Known, eqn: Any) -> _Known:
        """Describe a stack like its parts."""
        return value

    def materialized(self, value: _Known, eqn: Any, operation: str) -> _Known:
        """Describe a full weight: dropout does not reach it."""
        return _Known(value.axes)

    def into_shards(
        self, eqn: Any, program: ShardMap, inputs: Sequence[_Known]
    ) -> tuple[Vary, Sequence[_Known]]:
        """Start a record for the axes of this mesh, along which the inputs differ as well."""
        differ = [
            dataclasses.replace(value, axes=value.axes | axes_of(spec))
            for value, spec in zip(inputs, program.in_specs, strict=True)
        ]
        return Vary(), differ

    def out_of_shards(
        self, inner: Any, program: ShardMap, outputs: Sequence[_Known]
    ) -> list[_Known]:
        """Keep the axes outside of this mesh: the inner shard_map folds in its own."""
        for weight, axes in inner.met.items():
            self._meet((weight,), axes - program.axis_names)
        return [
            dataclasses.replace(value, axes=value.axes - program.axis_names) for value in outputs
        ]

    def _meet(self, weights: Any, data: Axes) -> None:
        for weight in weights:
            self.met[weight] = self.met.get(weight, data) & data


def _is_choice_of_kernels(eqn: Any, rule: Rule) -> bool:
    """Tell whether a lookup leaves matrices: some kernels of a stack, not rows of a table."""
    names = tuple(range(len(eqn.invars[0].aval.shape)))
    moves = rule.move(Operand(eqn, 0, names)) if rule.move is not None else None
    return moves is not None and sum(isinstance(name, int) for name in moves[0].axes) > 1


def _after(eqn: Any, axes: Axes) -> Axes:
    """Return the axes along which data differ after an operation that may run over some."""
    if eqn.params.get("axis_index_groups") is not None:
        return axes  # it makes them the same within each group only
    over = frozenset(_names(eqn.params.get("axes", eqn.params.get("axis_name"))))
    made_different = eqn.primitive.name.removesuffix("_start") in _MADE_DIFFERENT
    return axes | over if made_different else axes - over


def _names(entry: Any) -> tuple[str, ...]:
    entries = entry if isinstance(entry, (tuple, list, frozenset, set)) else (entry,)
    return tuple(name for name in entries if isinstance(name, str))
