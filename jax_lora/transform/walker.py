"""The jaxpr interpreter that all interpretations of the rules share.

    evaluate   computes with arrays and low-rank values    lora_apply
    analyze    propagates the names of axes only           find_kernels
    vary       propagates mesh axes only                   dropout inside shard_map

The walker owns the environment and looks up the rule of every equation that concerns an
interpretation. The interpretation defines the meaning of the rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from jax_lora.transform.equations import is_literal
from jax_lora.transform.rules import Rule
from jax_lora.transform.table import RULES

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Group:
    """Equations of one primitive that are evaluated together.

    Args:
      members: Indices of the equations, in order.
      data: For every member, the position of the shared data among its operands.
      early: Indices of the equations that compute the kernels of later members, in order.
    """

    members: tuple[int, ...]
    data: tuple[int, ...]
    early: tuple[int, ...]


class Interpretation(Protocol[Value]):
    """An interpretation of the rules. Every method returns one value per output of the equation."""

    def constant(self, array: Any) -> Value:
        """Return the value of a literal or a constant of the jaxpr."""
        ...

    def concerns(self, inputs: Sequence[Value]) -> bool:
        """Tell whether an equation with these inputs needs its rule."""
        ...

    def plain(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        """Interpret an equation that does not need its rule."""
        ...

    def move(self, eqn: Any, rule: Rule, inputs: Sequence[Value]) -> list[Value] | None:
        """Interpret an equation whose result is still a weight; None if the rule does not apply."""
        ...

    def consume(
        self, eqns: Sequence[Any], rule: Rule, inputs: Sequence[Sequence[Value]]
    ) -> list[list[Value] | None]:
        """Interpret equations that contract weights with the same data; None like `move`."""
        ...

    def enter(
        self, eqn: Any, rule: Rule, program: Any, inputs: Sequence[Value]
    ) -> list[Value] | None:
        """Interpret an equation with sub-jaxprs; None like `move`."""
        ...

    def without_rule(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        """Interpret an equation without a rule, or to which its rule does not apply."""
        ...

    def groups(self, jaxpr: Any, weights: Collection[Any]) -> Mapping[int, Group]:
        """Return groups of equations to evaluate together, by the index of their first member."""
        return {}


def interpret(
    interpretation: Interpretation[Value], eqn: Any, inputs: Sequence[Value]
) -> list[Value]:
    """Interpret one equation: a value per operand gives a value per output."""
    if not interpretation.concerns(inputs):
        return interpretation.plain(eqn, inputs)
    rule = RULES.get(eqn.primitive.name, Rule())
    outputs = None
    if rule.move is not None:
        outputs = interpretation.move(eqn, rule, inputs)
    if outputs is None and rule.read is not None:
        (outputs,) = interpretation.consume([eqn], rule, [inputs])
    if outputs is None and rule.open is not None and (program := rule.open(eqn)) is not None:
        outputs = interpretation.enter(eqn, rule, program, inputs)
    return interpretation.without_rule(eqn, inputs) if outputs is None else outputs


def walk(
    interpretation: Interpretation[Value],
    jaxpr: Any,
    consts: Sequence[Any],
    inputs: Sequence[Value],
) -> list[Value]:
    """Interpret an open jaxpr, given the arrays of its constants and a value per input."""
    env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    env.update(zip(jaxpr.constvars, map(interpretation.constant, consts), strict=True))
    groups = interpretation.groups(
        jaxpr, {var for var, value in env.items() if interpretation.concerns([value])}
    )
    steps = _Steps(interpretation, jaxpr.eqns, env)
    last_use = _last_uses(jaxpr)
    for index in range(len(jaxpr.eqns)):
        if index in groups:
            steps.visit_group(groups[index])
        steps.visit(index)
        for var in last_use.get(index, ()):
            env.pop(var, None)  # free arrays as early as an eager run of the model does
    return steps.read(jaxpr.outvars)


@dataclasses.dataclass
class _Steps(Generic[Value]):
    """The equations of a jaxpr, and the environment that they read and write."""

    interpretation: Interpretation[Value]
    eqns: Sequence[Any]
    env: dict[Any, Value]
    done: set[int] = dataclasses.field(default_factory=set)

    def read(self, variables: Sequence[Any]) -> list[Value]:
        constant = self.interpretation.constant
        return [constant(var.val) if is_literal(var) else self.env[var] for var in variables]

    def _write(self, index: int, outputs: Sequence[Value]) -> None:
        self.env.update(zip(self.eqns[index].outvars, outputs, strict=True))
        self.done.add(index)

    def visit(self, index: int) -> None:
        if index not in self.done:
            eqn = self.eqns[index]
            self._write(index, interpret(self.interpretation, eqn, self.read(eqn.invars)))

    def visit_group(self, group: Group) -> None:
        for index in group.early:
            self.visit(index)
        eqns = [self.eqns[index] for index in group.members]
        (x,) = self.read([eqns[0].invars[group.data[0]]])
        inputs = []
        for eqn, data in zip(eqns, group.data, strict=True):
            (kernel,) = self.read([eqn.invars[1 - data]])  # another cast of x may follow later
            inputs.append([x, kernel] if data == 0 else [kernel, x])
        rule = RULES[eqns[0].primitive.name]
        results = self.interpretation.consume(eqns, rule, inputs)
        for index, eqn, each, outputs in zip(group.members, eqns, inputs, results, strict=True):
            if outputs is None:
                outputs = self.interpretation.without_rule(eqn, each)
            self._write(index, outputs)


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Map the index of each equation to the variables that it is the last to read."""
    last = {
        var: index
        for index, eqn in enumerate(jaxpr.eqns)
        for var in (*eqn.invars, *eqn.outvars)
        if not is_literal(var)
    }
    for var in jaxpr.outvars:
        if not is_literal(var):
            last.pop(var, None)
    uses: dict[int, list[Any]] = {}
    for var, index in last.items():
        uses.setdefault(index, []).append(var)
    return uses
