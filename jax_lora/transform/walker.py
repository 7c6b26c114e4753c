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
from typing import Any, Protocol, TypeVar

from jax_lora.transform.equations import is_literal
from jax_lora.transform.programs import Body
from jax_lora.transform.rules import Rule
from jax_lora.transform.table import RULES

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Group:
    """Equations of one primitive that are evaluated together, by index."""

    members: tuple[int, ...]
    data: tuple[int, ...]  # for every member, the position of the shared data among its operands
    early: tuple[int, ...]  # equations that compute the kernels of later members


class Interpretation(Protocol[Value]):
    """An interpretation of the rules. Every method returns one value per output of the equation."""

    def constant(self, array: Any) -> Value:
        """Return the value of a literal or a constant of the jaxpr."""
        ...

    def concerns(self, inputs: Sequence[Value]) -> bool:
        """Tell whether an equation with these inputs needs its rule."""
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
        """Interpret an equation that needs no rule, has none, or to which it does not apply."""
        ...

    def groups(self, jaxpr: Any, weights: Collection[Any]) -> Mapping[int, Group]:
        """Return groups of equations to evaluate together, by the index of their first member."""
        return {}


def interpret(
    interpretation: Interpretation[Value], eqn: Any, inputs: Sequence[Value]
) -> list[Value]:
    """Interpret one equation: a value per operand gives a value per output."""
    if not interpretation.concerns(inputs):
        return interpretation.without_rule(eqn, inputs)
    rule = RULES.get(eqn.primitive.name, Rule())
    outputs = None
    if rule.move is not None:
        outputs = interpretation.move(eqn, rule, inputs)
    if outputs is None and rule.read is not None:
        (outputs,) = interpretation.consume([eqn], rule, [inputs])
    if outputs is None and rule.open is not None and (program := rule.open(eqn)) is not None:
        outputs = interpretation.enter(eqn, rule, program, inputs)
    return interpretation.without_rule(eqn, inputs) if outputs is None else outputs


def walk(interpretation: Interpretation[Value], body: Body, inputs: Sequence[Value]) -> list[Value]:
    """Interpret a jaxpr, given a value per input."""
    jaxpr, eqns, done = body.jaxpr, body.jaxpr.eqns, set()
    env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    env.update(zip(jaxpr.constvars, map(interpretation.constant, body.consts), strict=True))

    def read(var: Any) -> Value:
        return interpretation.constant(var.val) if is_literal(var) else env[var]

    def write(index: int, outputs: Sequence[Value]) -> None:
        env.update(zip(eqns[index].outvars, outputs, strict=True))
        done.add(index)

    def visit(index: int) -> None:
        if index not in done:
            inputs = list(map(read, eqns[index].invars))
            write(index, interpret(interpretation, eqns[index], inputs))

    def visit_group(group: Group) -> None:
        for index in group.early:
            visit(index)
        members = [eqns[index] for index in group.members]
        x = read(members[0].invars[group.data[0]])
        inputs = []
        for eqn, data in zip(members, group.data, strict=True):
            kernel = read(eqn.invars[1 - data])  # another cast of x may follow later
            inputs.append([x, kernel] if data == 0 else [kernel, x])
        results = interpretation.consume(members, RULES[members[0].primitive.name], inputs)
        for index, each, outputs in zip(group.members, inputs, results, strict=True):
            if outputs is None:
                outputs = interpretation.without_rule(eqns[index], each)
            write(index, outputs)

    weights = {var for var, value in env.items() if interpretation.concerns([value])}
    groups = interpretation.groups(jaxpr, weights)
    last_use = _last_uses(jaxpr)
    for index in range(len(eqns)):
        if index in groups:
            visit_group(groups[index])
        visit(index)
        for var in last_use.get(index, ()):
            env.pop(var, None)  # free arrays as early as an eager run of the model does
    return list(map(read, jaxpr.outvars))


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Map the index of each equation to the variables that it is the last to read."""
    last = {
        var: index
        for index, eqn in enumerate(jaxpr.eqns)
        for var in (*eqn.invars, *eqn.outvars)
        if not is_literal(var)
    }
    returned = {var for var in jaxpr.outvars if not is_literal(var)}
    uses: dict[int, list[Any]] = {}
    for var in last.keys() - returned:
        uses.setdefault(last[var], []).append(var)
    return uses
