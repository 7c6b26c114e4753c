"""evaluate: the interpretation behind `lora_apply`. It computes with arrays and low-rank values.

A structural rule applies the operation to W0 and the corresponding steps to the factors. A rule of
a contraction computes the product. If there is no rule, or the rule does not apply, the full weight
is materialized for that equation only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.algebra import moves
from jax_lora.algebra.base_weight import Recipe
from jax_lora.algebra.low_rank import LowRank, addend_applies, is_low_rank, materialize
from jax_lora.transform import sharing, vary
from jax_lora.transform.contraction import Contraction
from jax_lora.transform.equations import UNKNOWN, evaluate_equation, location, with_operand
from jax_lora.transform.programs import Body, ShardMap
from jax_lora.transform.rules import Operand, Rule
from jax_lora.transform.sites import Settings
from jax_lora.transform.strategies import Choice, Strategy
from jax_lora.transform.structural import rows_of_codes
from jax_lora.transform.walker import Group, Interpretation, walk

Value = Any  # an array or a LowRank


@dataclasses.dataclass(eq=False)
class Evaluate(Interpretation[Value]):
    """Evaluates jaxprs on arrays and low-rank values."""

    settings: Settings
    strategy: Strategy
    times: int = 1  # how often the jaxpr runs: the length of the scans around it
    called_at: str = UNKNOWN  # source line of the call, if the jaxpr is inside another one
    _uses: int = 0  # uses of weights so far, each of which has a separate dropout key

    def constant(self, array: Any) -> Value:
        """Return the array."""
        return array

    def concerns(self, inputs: Sequence[Value]) -> bool:
        """Tell whether a low-rank value is among the inputs."""
        return any(map(is_low_rank, inputs))

    def move(self, eqn: Any, rule: Rule, inputs: Sequence[Value]) -> list[Value] | None:
        """Apply the equation to W0, and the steps of its move to the factors."""
        weights = [i for i, value in enumerate(inputs) if is_low_rank(value)]
        if rule.move is None or (len(weights) > 1 and not rule.each):
            return None
        if len(inputs) > 1 and not rule.each and not inputs[weights[0]].is_weight:
            return None  # a single row or column is materialized when it is combined with data
        moved: dict[int, LowRank] = {}
        for position in weights:
            planned = rule.move(Operand(eqn, position, inputs[position].axes, inputs))
            if planned is None:
                return None
            places = [position] if rule.each else range(len(planned))
            for place, move in zip(places, planned, strict=True):
                changed = moves.apply_move(inputs[position], move)
                if changed is None:
                    return None
                moved[place] = changed
        bases = _on_bases(eqn, rule, inputs)
        return [
            moved[place].replace(base=base)
            if place in moved and (moved[place].a is not None or isinstance(base, Recipe))
            else base
            for place, base in enumerate(bases)
        ]

    def consume(
        self, eqns: Sequence[Any], rule: Rule, inputs: Sequence[Sequence[Value]]
    ) -> list[list[Value] | None]:
        """Compute contractions of weights; None for an equation that needs the full weight."""
        contractions = [self._contraction(*each, rule) for each in zip(eqns, inputs, strict=True)]
        adapted = [each for each in contractions if each is not None and each.value.a is not None]
        computed = iter(rule.compute(self, adapted) if rule.compute and adapted else ())
        return [
            None
            if each is None
            else [each.on_base()]
            if each.value.a is None
            else each.finished(next(computed))
            for each in contractions
        ]

    def enter(
        self, eqn: Any, rule: Rule, program: Any, inputs: Sequence[Value]
    ) -> list[Value] | None:
        """Rebuild an equation around the evaluation of its sub-jaxprs."""
        if rule.rebuild is None:
            return None
        return rule.rebuild(self, eqn, program, [self.fresh(value) for value in inputs])

    def without_rule(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        """Materialize, and evaluate on arrays."""
        return evaluate_equation(eqn, *self.dense(inputs, eqn))

    def groups(self, jaxpr: Any, weights: Collection[Any]) -> Mapping[int, Group]:
        """Group contractions with the same data."""
        return sharing.find_groups(jaxpr, weights)

    def run(self, body: Body, inputs: Sequence[Value], times: int = 1) -> list[Value]:
        """Evaluate a sub-jaxpr, with a separate count of uses."""
        inner = Evaluate(self.settings, self.strategy, self.times * times, self.called_at)
        return walk(inner, body, inputs)

    def varying_axes(self, program: ShardMap, weights: Sequence[bool]) -> list[frozenset[str]]:
        """Return, per weight, the mesh axes along which all of its data varies."""
        specs = list(map(vary.axes_of, program.in_specs))
        return vary.axes_of_data(program.body.jaxpr, specs, weights)

    def dense(
        self,
        values: Sequence[Value],
        eqn: Any,
        operation: str | None = None,
        keep: Callable[[LowRank], bool] = lambda value: False,
    ) -> list[Any]:
        """Materialize the low-rank values among some values, except those to keep.

        Messages name the operation, which is by default the primitive of the equation.
        """
        arrays = list(values)
        for i, value in enumerate(values):
            if is_low_rank(value) and not keep(value):
                name = operation or eqn.primitive.name
                self.settings.materialize(value, name, self.locate(eqn), self.times)
                arrays[i] = materialize(value)
        return arrays

    def note(self, contraction: Contraction, choice: Choice, **sizes: Any) -> None:
        """Record the form and the sizes of a contraction."""
        self.settings.note(
            contraction.value,
            choice,
            where=self.locate(contraction.eqn),
            operation=contraction.eqn.primitive.name,
            times=self.times,
            **sizes,
        )

    def locate(self, eqn: Any) -> str:
        """Return the source line of an equation, or of the call of the library that contains it."""
        return location(eqn, self.called_at)

    def fresh(self, value: Value) -> Value:
        """Derive the dropout key of this use of a value."""
        if not is_low_rank(value) or value.key is None:
            return value
        self._uses += 1
        return value.replace(key=jax.random.fold_in(value.key, self._uses))

    def _contraction(self, eqn: Any, inputs: Sequence[Value], rule: Rule) -> Contraction | None:
        """Read how an equation uses a weight; None if there is no low-rank form."""
        weights = [i for i, value in enumerate(inputs) if is_low_rank(value)]
        if len(weights) != 1 or rule.read is None or rule.compute is None:
            return None
        (position,) = weights
        value = inputs[position]
        weight = Operand(eqn, position, value.axes, inputs)
        use = rule.read(weight)
        if use is None or not _is_floating(value):
            return None
        is_lookup = use.kind == "embedding"
        if not is_lookup and not _is_floating(inputs[use.data]):
            return None
        has_addend = value.addend is not None
        if has_addend and (is_lookup or not addend_applies(value, use.summed, use.out_axes)):
            return None
        fresh = [*inputs[:position], self.fresh(value), *inputs[position + 1 :]]
        return Contraction(eqn, tuple(fresh), weight, use)


def _is_floating(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _on_bases(eqn: Any, rule: Rule, inputs: Sequence[Value]) -> list[Any]:
    """Evaluate an equation on the base weights; a recipe is extended instead of evaluated."""
    bases = [value.base if is_low_rank(value) else value for value in inputs]
    recipes = [i for i, base in enumerate(bases) if isinstance(base, Recipe)]
    if not recipes:
        return evaluate_equation(eqn, *bases)
    first = recipes[0]
    rows = rows_of_codes(Operand(eqn, first, inputs[first].axes, inputs), bases[first])
    if rows is not None:
        return [rows]
    if len(bases) > 1 and rule.each:
        return bases  # an optimization barrier has no effect on a weight that is not computed yet
    (position,) = recipes
    others = tuple(base for i, base in enumerate(bases) if i != position)
    return [
        bases[position].then(
            lambda w, *others, place=place: evaluate_equation(
                eqn, *with_operand(position, w, others)
            )[place],
            (eqn, place),
            others,
            rule.elementwise,
        )
        for place in range(len(eqn.outvars))
    ]
