"""The interpreter: evaluates a jaxpr again with low-rank values in the place of arrays.

An equation without a low-rank input is evaluated as it stands. One with such an input goes to the
rule for its primitive; where there is no rule, or the rule does not apply, the full weight is
formed just for that equation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
from jax.extend import core as jex_core

from jax_lora import lowrank
from jax_lora.lowrank import LowRank
from jax_lora.transform.sites import Materializations, location

Value = Any  # an array or a LowRank
Rule = Callable[["Interpreter", Any, list[Value]], "list[Value] | None"]

RULES: dict[str, Rule] = {}
_DEBUG_INFO = jex_core.DebugInfo("lora_apply", "lora_apply", None, None)


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Register the rule for the primitives of these names.

    A rule takes the interpreter, the equation and its inputs, of which at least one is a
    `LowRank`, and returns the outputs, or None where it does not apply.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


def is_lowrank(value: Any) -> bool:
    """Tell whether a value is low-rank: `is_leaf` for tree functions."""
    return isinstance(value, LowRank)


def bind(eqn: Any, *inputs: Any) -> list[Any]:
    """Evaluate one equation on arrays.

    Wrapping it in a jaxpr of its own leaves the differences between JAX versions in how
    primitives are bound to `eval_jaxpr`, which also keeps name scopes.
    """
    # A variable that stands twice has the same value twice.
    values = {
        var: value
        for var, value in zip(eqn.invars, inputs, strict=True)
        if not isinstance(var, jex_core.Literal)
    }
    jaxpr = jex_core.Jaxpr((), list(values), eqn.outvars, [eqn], eqn.effects, _DEBUG_INFO)
    return jax.core.eval_jaxpr(jaxpr, (), *values.values())


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Split a jaxpr of either kind into the open jaxpr and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


class Interpreter:
    """Evaluates jaxprs on arrays and low-rank values.

    Args:
      materializations: What to say when a weight is formed.
    """

    def __init__(self, materializations: Materializations):
        """Start with no use of any weight counted."""
        self.materializations = materializations
        self._uses = 0

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        """Evaluate an open jaxpr.

        Args:
          jaxpr: The open jaxpr.
          consts: Values of its constants.
          inputs: Arrays and low-rank values.

        Returns:
          The outputs; a low-rank input that only went through structural operations comes out
          low-rank.
        """
        env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))
        last_use = _last_uses(jaxpr)

        def read(var: Any) -> Value:
            return var.val if isinstance(var, jex_core.Literal) else env[var]

        for index, eqn in enumerate(jaxpr.eqns):
            outputs = self._equation(eqn, [read(var) for var in eqn.invars])
            env.update(zip(eqn.outvars, outputs, strict=True))
            for var in last_use.get(index, ()):
                env.pop(var, None)  # so that an eager run holds no more than the model itself does
        return [read(var) for var in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[Value]) -> list[Value]:
        if not any(map(is_lowrank, inputs)):
            return bind(eqn, *inputs)
        apply = RULES.get(eqn.primitive.name)
        outputs = apply(self, eqn, inputs) if apply is not None else None
        if outputs is None:
            outputs = bind(eqn, *self.dense(inputs, eqn))
        return outputs

    def dense(self, values: Sequence[Value], eqn: Any, operation: str | None = None) -> list[Any]:
        """Form every low-rank value among some, saying so once per site.

        Args:
          values: Arrays and low-rank values.
          eqn: The equation that needs arrays.
          operation: What to call it; by default the name of its primitive.

        Returns:
          Arrays only.
        """
        result = []
        for value in values:
            if is_lowrank(value):
                name = operation or eqn.primitive.name
                if value.is_matrix:
                    self.materializations.report(value.path, name, location(eqn))
                value = lowrank.materialize(value)
            result.append(value)
        return result

    def inner(self) -> Interpreter:
        """Return an interpreter for a program inside this one, which counts uses for itself."""
        return Interpreter(self.materializations)

    def fresh(self, value: Value) -> Value:
        """Give a value with dropout a key for this one use of it."""
        if not is_lowrank(value) or value.key is None:
            return value
        self._uses += 1
        return value.replace(key=jax.random.fold_in(value.key, self._uses))


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Map each equation's index to the variables that nothing reads after it."""
    kept = {var for var in jaxpr.outvars if not isinstance(var, jex_core.Literal)}
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for var in (*eqn.invars, *eqn.outvars):
            if not isinstance(var, jex_core.Literal) and var not in kept:
                last[var] = index
    uses: dict[int, list[Any]] = {}
    for var, index in last.items():
        uses.setdefault(index, []).append(var)
    return uses
