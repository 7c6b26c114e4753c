"""The walker: one way through a program, for every interpretation of the rules.

    evaluate   runs the program with low-rank values          lora_apply
    analyze    follows names of axes, and computes nothing    find_kernels
    vary       follows axes of a mesh                         dropout inside shard_map

A program is a list of equations. The walker owns the environment and looks up the rule of each
equation that an interpretation cares about. What a rule means is the interpretation's to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

from jax_lora.transform.equations import is_literal
from jax_lora.transform.rules import Rule
from jax_lora.transform.table import RULES

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Group:
    """Equations of one primitive that are evaluated together.

    Args:
      members: Their indices in the program, the first of them first.
      data: Position of the data that they share among each one's operands.
      early: Indices of the equations that prepare the other operands of later members, in order.
    """

    members: tuple[int, ...]
    data: tuple[int, ...]
    early: tuple[int, ...]


class Interpretation(Generic[Value]):
    """One reading of the rules. Each method returns a value per output of the equation."""

    def constant(self, array: Any) -> Value:
        """Return the value of a literal or a constant of the program."""
        raise NotImplementedError

    def concerns(self, inputs: Sequence[Value]) -> bool:
        """Tell whether an equation with these inputs needs its rule."""
        raise NotImplementedError

    def plain(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        """Interpret an equation that needs no rule."""
        raise NotImplementedError

    def move(self, eqn: Any, rule: Rule, inputs: Sequence[Value]) -> list[Value] | None:
        """Interpret an equation that moves the axes of a weight; None where it loses them."""
        raise NotImplementedError

    def consume(
        self, eqns: Sequence[Any], rule: Rule, inputs: Sequence[Sequence[Value]]
    ) -> list[list[Value] | None]:
        """Interpret equations that use weights up, one or several that read the same data."""
        raise NotImplementedError

    def enter(self, eqn: Any, rule: Rule, inputs: Sequence[Value]) -> list[Value] | None:
        """Interpret an equation that holds programs; None where it cannot be opened."""
        raise NotImplementedError

    def without_rule(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        """Interpret an equation that has no rule, or to which its rule does not apply."""
        raise NotImplementedError

    def groups(self, jaxpr: Any, weights: Collection[Any]) -> Mapping[int, Group]:
        """Return the equations to evaluate together, by the first one's index."""
        return {}


def interpret(
    interpretation: Interpretation[Value], eqn: Any, inputs: Sequence[Value]
) -> list[Value]:
    """Interpret one equation.

    Args:
      interpretation: How to read the rules.
      eqn: The equation.
      inputs: The value of each operand.

    Returns:
      The value of each output.
    """
    if not interpretation.concerns(inputs):
        return interpretation.plain(eqn, inputs)
    rule = RULES.get(eqn.primitive.name, Rule())
    outputs = None
    if rule.move is not None:
        outputs = interpretation.move(eqn, rule, inputs)
    if outputs is None and rule.read is not None:
        (outputs,) = interpretation.consume([eqn], rule, [inputs])
    if outputs is None and rule.open is not None:
        outputs = interpretation.enter(eqn, rule, inputs)
    return interpretation.without_rule(eqn, inputs) if outputs is None else outputs


def walk(
    interpretation: Interpretation[Value],
    jaxpr: Any,
    consts: Sequence[Any],
    inputs: Sequence[Value],
) -> list[Value]:
    """Interpret a program.

    Args:
      interpretation: How to read the rules.
      jaxpr: The open jaxpr.
      consts: Arrays for its constants.
      inputs: A value per input.

    Returns:
      A value per output.
    """
    return _Walk(interpretation, jaxpr, consts, inputs).outputs()


class _Walk(Generic[Value]):
    """One walk through one program."""

    def __init__(
        self,
        interpretation: Interpretation[Value],
        jaxpr: Any,
        consts: Sequence[Any],
        inputs: Sequence[Value],
    ):
        self._interpretation = interpretation
        self._jaxpr = jaxpr
        constants = map(interpretation.constant, consts)
        self._env: dict[Any, Value] = dict(zip(jaxpr.constvars, constants, strict=True))
        self._env.update(zip(jaxpr.invars, inputs, strict=True))
        self._done: set[int] = set()

    def outputs(self) -> list[Value]:
        """Interpret every equation, and return the outputs."""
        concerns = self._interpretation.concerns
        weights = {var for var, value in self._env.items() if concerns([value])}
        groups = self._interpretation.groups(self._jaxpr, weights)
        last_use = _last_uses(self._jaxpr)
        for index in range(len(self._jaxpr.eqns)):
            if index in groups:
                self._visit_group(groups[index])
            self._visit(index)
            for var in last_use.get(index, ()):
                self._env.pop(var, None)  # an eager run holds no more than the model itself does
        return self._read(self._jaxpr.outvars)

    def _read(self, variables: Sequence[Any]) -> list[Value]:
        constant = self._interpretation.constant
        return [constant(var.val) if is_literal(var) else self._env[var] for var in variables]

    def _write(self, index: int, outputs: Sequence[Value]) -> None:
        self._env.update(zip(self._jaxpr.eqns[index].outvars, outputs, strict=True))
        self._done.add(index)

    def _visit(self, index: int) -> None:
        if index not in self._done:
            eqn = self._jaxpr.eqns[index]
            self._write(index, interpret(self._interpretation, eqn, self._read(eqn.invars)))

    def _visit_group(self, group: Group) -> None:
        for index in group.early:
            self._visit(index)
        eqns = [self._jaxpr.eqns[index] for index in group.members]
        (x,) = self._read([eqns[0].invars[group.data[0]]])
        inputs = []
        for eqn, data in zip(eqns, group.data, strict=True):
            (kernel,) = self._read([eqn.invars[1 - data]])  # x itself may come later in the program
            inputs.append([x, kernel] if data == 0 else [kernel, x])
        rule = RULES[eqns[0].primitive.name]
        results = self._interpretation.consume(eqns, rule, inputs)
        for index, eqn, each, outputs in zip(group.members, eqns, inputs, results, strict=True):
            if outputs is None:
                outputs = self._interpretation.without_rule(eqn, each)
            self._write(index, outputs)


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Map each equation's index to the variables that nothing reads after it."""
    kept = {var for var in jaxpr.outvars if not is_literal(var)}
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for var in (*eqn.invars, *eqn.outvars):
            if not is_literal(var) and var not in kept:
                last[var] = index
    uses: dict[int, list[Any]] = {}
    for var, index in last.items():
        uses.setdefault(index, []).append(var)
    return uses
