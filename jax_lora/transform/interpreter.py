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
from jax_lora.transform import sharing
from jax_lora.transform.forms import FACTORED
from jax_lora.transform.sites import UNKNOWN, Settings, bias_error, location, site_of

Value = Any  # an array or a LowRank
Rule = Callable[["Interpreter", Any, list[Value]], "list[Value] | None"]
SharedRule = Callable[
    ["Interpreter", Sequence[Any], Sequence[list[Value]]], "list[list[Value] | None]"
]

RULES: dict[str, Rule] = {}
SHARED_RULES: dict[str, SharedRule] = {}
STRUCTURAL: set[str] = set()  # primitives that keep a low-rank value what it is
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


def structural_rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Register a rule whose output is low-rank where its input is."""
    STRUCTURAL.update(primitives)
    return rule(*primitives)


def shared_rule(*primitives: str) -> Callable[[SharedRule], SharedRule]:
    """Register a rule that takes several equations which read the same data, and does them all."""

    def register(function: SharedRule) -> SharedRule:
        SHARED_RULES.update(dict.fromkeys(primitives, function))
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
      settings: What the caller of `lora_apply` asked for.
      times: How often the program runs: more than once inside a scan.
      called_at: Where the program is called from, if it lies inside another.
    """

    def __init__(self, settings: Settings, times: int = 1, called_at: str = UNKNOWN):
        """Start with no use of any weight counted."""
        self.settings = settings
        self.times = times
        self.called_at = called_at
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
        return _Evaluation(self, jaxpr, consts, inputs).outputs()

    def equation(self, eqn: Any, inputs: list[Value]) -> list[Value]:
        """Evaluate one equation: by its rule, or on arrays where there is none."""
        if not any(map(is_lowrank, inputs)):
            return bind(eqn, *inputs)
        if eqn.primitive.name in SHARED_RULES:
            return self.equations([eqn], [inputs])[0]
        apply = RULES.get(eqn.primitive.name)
        outputs = apply(self, eqn, inputs) if apply is not None else None
        return self._on_arrays(eqn, inputs) if outputs is None else outputs

    def equations(self, eqns: Sequence[Any], inputs: Sequence[list[Value]]) -> list[list[Value]]:
        """Evaluate equations of one primitive that read the same data."""
        outputs = SHARED_RULES[eqns[0].primitive.name](self, eqns, inputs)
        return [
            self._on_arrays(eqn, each) if output is None else output
            for eqn, each, output in zip(eqns, inputs, outputs, strict=True)
        ]

    def _on_arrays(self, eqn: Any, inputs: list[Value]) -> list[Any]:
        return bind(eqn, *self.dense(inputs, eqn))

    def dense(self, values: Sequence[Value], eqn: Any, operation: str | None = None) -> list[Any]:
        """Form every low-rank value among some, saying so once per site.

        Args:
          values: Arrays and low-rank values.
          eqn: The equation that needs arrays.
          operation: What to call it; by default the name of its primitive.

        Returns:
          Arrays only.

        Raises:
          MaterializeError: A value cannot be formed, as it has a bias; or the policy is "error".
        """
        result = []
        for value in values:
            if is_lowrank(value):
                name = operation or eqn.primitive.name
                if value.bias is not None:
                    raise bias_error(value.path, name, self.locate(eqn))
                if value.is_matrix:
                    self.settings.materialized(value, name, self.locate(eqn), self.times)
                value = lowrank.materialize(value)
            result.append(value)
        return result

    def factored(self, eqn: Any, value: LowRank, tokens: int) -> None:
        """Write down a use of a value by an operation that has one form only."""
        name = eqn.primitive.name
        why = "the only low-rank form of this operation"
        site = site_of(
            value, name, self.locate(eqn), FACTORED, why, tokens=tokens, times=self.times
        )
        self.settings.note(site)

    def inner(self, times: int = 1) -> Interpreter:
        """Return an interpreter for a program inside this one, which counts uses for itself."""
        return Interpreter(self.settings, self.times * times, self.called_at)

    def locate(self, eqn: Any) -> str:
        """Return the line of an equation, or of the call where a library's function holds it."""
        where = location(eqn)
        return self.called_at if where == UNKNOWN else where

    def fresh(self, value: Value) -> Value:
        """Give a value with dropout a key for this one use of it."""
        if not is_lowrank(value) or value.key is None:
            return value
        self._uses += 1
        return value.replace(key=jax.random.fold_in(value.key, self._uses))


class _Evaluation:
    """One run of one program."""

    def __init__(
        self,
        interpreter: Interpreter,
        jaxpr: Any,
        consts: Sequence[Any],
        inputs: Sequence[Value],
    ):
        self._interpreter = interpreter
        self._jaxpr = jaxpr
        self._env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        self._env.update(zip(jaxpr.invars, inputs, strict=True))
        self._done: set[int] = set()

    def outputs(self) -> list[Value]:
        """Evaluate every equation and return the outputs."""
        weights = {var for var, value in self._env.items() if is_lowrank(value)}
        groups = sharing.find_groups(self._jaxpr, weights, STRUCTURAL)
        last_use = _last_uses(self._jaxpr)
        for index in range(len(self._jaxpr.eqns)):
            if index in groups:
                self._evaluate_group(groups[index])
            self._evaluate(index)
            for var in last_use.get(index, ()):
                self._env.pop(var, None)  # an eager run holds no more than the model itself does
        return self._read(self._jaxpr.outvars)

    def _read(self, variables: Sequence[Any]) -> list[Value]:
        return [
            var.val if isinstance(var, jex_core.Literal) else self._env[var] for var in variables
        ]

    def _write(self, index: int, outputs: Sequence[Value]) -> None:
        self._env.update(zip(self._jaxpr.eqns[index].outvars, outputs, strict=True))
        self._done.add(index)

    def _evaluate(self, index: int) -> None:
        if index not in self._done:
            eqn = self._jaxpr.eqns[index]
            self._write(index, self._interpreter.equation(eqn, self._read(eqn.invars)))

    def _evaluate_group(self, group: sharing.Group) -> None:
        for index in group.early:
            self._evaluate(index)
        eqns = [self._jaxpr.eqns[index] for index in group.members]
        (x,) = self._read([eqns[0].invars[group.data[0]]])
        inputs = []
        for eqn, data in zip(eqns, group.data, strict=True):
            (kernel,) = self._read([eqn.invars[1 - data]])  # x itself may come later in the program
            inputs.append([x, kernel] if data == 0 else [kernel, x])
        outputs = self._interpreter.equations(eqns, inputs)
        for index, output in zip(group.members, outputs, strict=True):
            self._write(index, output)


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
