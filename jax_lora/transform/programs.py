"""Sub-jaxprs of equations (jit, scan, cond, ...), and the inputs that each of them receives.

If a version of JAX has other parameters than expected, the result is None, and the equation is
treated like one without a rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Body:
    """A sub-jaxpr: an open jaxpr, and the arrays of its constants."""

    jaxpr: Any
    consts: Sequence[Any]

    @classmethod
    def of(cls, program: Any) -> Body:
        """Split an open or closed jaxpr."""
        return cls(getattr(program, "jaxpr", program), getattr(program, "consts", ()))


@dataclasses.dataclass(frozen=True)
class Call:
    """A sub-jaxpr that runs once: jit, remat, a function with a custom derivative."""

    body: Body


@dataclasses.dataclass(frozen=True)
class Scan:
    """A sub-jaxpr that runs once per slice of some inputs."""

    body: Body
    n_consts: int
    n_carry: int
    length: int

    def split(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Split inputs into constants, carry, and scanned arrays."""
        return _in_three(inputs, self.n_consts, self.n_carry)

    @property
    def unchanged(self) -> list[bool]:
        """Which values of the carry the body returns unchanged, so that they are constant."""
        return _unchanged(self.body, self.n_consts, self.n_carry)


@dataclasses.dataclass(frozen=True)
class While:
    """The two sub-jaxprs of a while loop: its condition and its body."""

    test: Body
    body: Body
    n_test: int
    n_body: int

    def split(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Split inputs into constants of the condition, constants of the body, and carry."""
        return _in_three(inputs, self.n_test, self.n_body)

    @property
    def unchanged(self) -> list[bool]:
        """Which values of the carry the body returns unchanged, so that they are constant."""
        return _unchanged(self.body, self.n_body, len(self.body.jaxpr.outvars))


@dataclasses.dataclass(frozen=True)
class Cond:
    """Sub-jaxprs of which one runs."""

    branches: tuple[Body, ...]


@dataclasses.dataclass(frozen=True)
class ShardMap:
    """A sub-jaxpr that runs on every shard."""

    body: Body
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    axis_names: frozenset[str]
    mesh: Any
    check_vma: bool


def _in_three(
    inputs: Sequence[Any], first: int, second: int
) -> tuple[list[Any], list[Any], list[Any]]:
    end = first + second
    return list(inputs[:first]), list(inputs[first:end]), list(inputs[end:])


def _unchanged(body: Body, n_consts: int, n_carry: int) -> list[bool]:
    carried = body.jaxpr.invars[n_consts : n_consts + n_carry]
    return [new is old for old, new in zip(carried, body.jaxpr.outvars, strict=False)]


def _reads(eqn: Any, *names: str) -> bool:
    return set(names) <= set(eqn.params)


def open_call(eqn: Any) -> Call | None:
    """`jit`, a plain call, or a function with a custom derivative."""
    for name in ("call_jaxpr", "jaxpr"):
        if _reads(eqn, name):
            body = Body.of(eqn.params[name])
            return Call(body) if len(body.jaxpr.invars) == len(eqn.invars) else None
    return None


def open_remat(eqn: Any) -> Call | None:
    """`checkpoint`, which JAX has also called `remat`."""
    return open_call(eqn) if _reads(eqn, "prevent_cse", "policy") else None


def open_scan(eqn: Any) -> Scan | None:
    """`scan`. The numbers of constants and carried values follow from the ranks.

    In every version of JAX, a scanned array loses an axis in the body, and a carried value keeps
    its rank.
    """
    if not _reads(eqn, "jaxpr", "length", "reverse", "unroll"):
        return None
    body = Body.of(eqn.params["jaxpr"])
    keeps_rank = lambda outer, inner: outer.aval.ndim == inner.aval.ndim  # noqa: E731
    whole_in = list(map(keeps_rank, eqn.invars, body.jaxpr.invars))
    whole_out = list(map(keeps_rank, eqn.outvars, body.jaxpr.outvars))
    n_whole, n_carry = sum(whole_in), sum(whole_out)
    in_order = all(whole_in[:n_whole]) and all(whole_out[:n_carry]) and n_whole >= n_carry
    return Scan(body, n_whole - n_carry, n_carry, eqn.params["length"]) if in_order else None


def open_while(eqn: Any) -> While | None:
    """`while`, with its condition and its body."""
    if not _reads(eqn, "cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"):
        return None
    params = eqn.params
    test, body = Body.of(params["cond_jaxpr"]), Body.of(params["body_jaxpr"])
    return While(test, body, params["cond_nconsts"], params["body_nconsts"])


def open_cond(eqn: Any) -> Cond | None:
    """`cond`, of any number of branches."""
    if not _reads(eqn, "branches"):
        return None
    return Cond(tuple(map(Body.of, eqn.params["branches"])))


def open_shard_map(eqn: Any) -> ShardMap | None:
    """`shard_map`, whose manual axes two versions of JAX name differently."""
    params = eqn.params
    if not _reads(eqn, "mesh", "in_specs", "out_specs", "jaxpr", "check_vma"):
        return None
    names = params.get("newly_manual_axes", params.get("manual_axes", frozenset()))
    return ShardMap(
        Body.of(params["jaxpr"]),
        tuple(params["in_specs"]),
        tuple(params["out_specs"]),
        names,
        params["mesh"],
        params["check_vma"],
    )
