"""Find contractions with the same data, such as q, k and v.

A jaxpr contracts q before it casts or reshapes the kernels of k and v. To compute the three
together, those kernels must be computed earlier, which is possible if they depend on weights only.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any

from jax_lora.transform.equations import is_literal
from jax_lora.transform.table import RULES
from jax_lora.transform.walker import Group

Var = Any


def find_groups(jaxpr: Any, weights: Collection[Var]) -> dict[int, Group]:
    """Find the contractions of an open jaxpr that can be computed together.

    `weights` are its inputs that are low-rank values. The result maps the index of the first
    member to a group of at least two equations.
    """
    program = _Program(jaxpr, weights)
    alike: dict[Hashable, list[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        key = program.reads(eqn)
        if key is not None:
            alike.setdefault(key, []).append(index)
    groups = (program.group(indices) for indices in alike.values() if len(indices) > 1)
    return {group.members[0]: group for group in groups if len(group.members) > 1}


class _Program:
    def __init__(self, jaxpr: Any, weights: Collection[Var]):
        self._eqns = jaxpr.eqns
        self._maker = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
        self._weights = set(weights)
        for eqn in jaxpr.eqns:
            if _moves(eqn) and any(map(self._is_weight, eqn.invars)):
                self._weights.update(eqn.outvars)

    def _is_weight(self, var: Var) -> bool:
        return not is_literal(var) and var in self._weights

    def reads(self, eqn: Any) -> Hashable | None:
        """Return a key of the data of a contraction: equations with equal keys can be grouped."""
        if eqn.primitive.name != "dot_general":
            return None
        sides = [self._is_weight(var) for var in eqn.invars]
        contract, batch = eqn.params["dimension_numbers"]
        if sides[0] == sides[1] or batch[0]:
            return None
        data = sides.index(False)
        axes = tuple(sorted(contract[data]))
        return self._same(eqn.invars[data]), axes, str(eqn.params.get("precision"))

    def _same(self, var: Var) -> Hashable:
        """Return a key of a value, which equal casts of one array share: every Dense casts x."""
        index = None if is_literal(var) else self._maker.get(var)
        if index is None:
            return var
        eqn = self._eqns[index]
        if eqn.primitive.name not in ("convert_element_type", "reshape", "transpose", "squeeze"):
            return var
        return eqn.primitive.name, str(eqn.params), self._same(eqn.invars[0])

    def group(self, indices: Sequence[int]) -> Group:
        """Keep the members whose kernels can be computed before the first member."""
        first = indices[0]
        members, early = [first], set()
        for index in indices[1:]:
            (kernel,) = filter(self._is_weight, self._eqns[index].invars)
            needed = self._needs(kernel, first)
            if needed is not None:
                members.append(index)
                early |= needed
        data = (int(self._is_weight(self._eqns[index].invars[0])) for index in members)
        return Group(tuple(members), tuple(data), tuple(sorted(early)))

    def _needs(self, var: Var, before: int) -> set[int] | None:
        """Return the equations from `before` on that compute a kernel; None if it must wait."""
        index = None if is_literal(var) else self._maker.get(var)
        if index is None or index < before:
            return set()
        eqn = self._eqns[index]
        if eqn.effects or not _moves(eqn):
            return None
        needed = {index}
        for each in eqn.invars:
            inner = self._needs(each, before)
            if inner is None:
                return None
            needed |= inner
        return needed


def _moves(eqn: Any) -> bool:
    rule = RULES.get(eqn.primitive.name)
    return rule is not None and rule.move is not None and rule.read is None
