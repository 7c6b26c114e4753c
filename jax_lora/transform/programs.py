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
    """A sub-jaxpr: that of a call (jit, remat, a custom derivative), or one of several."""

    jaxpr: Any  # open
    consts: Sequence[Any]  # the arrays of its constants

    @classmethod
    def of(cls, program: Any) -> Body:
        """Split an open or closed jaxpr."""
        return cls(getattr(program, "jaxpr", program), getattr(program, "consts", ()))


@dataclasses.dataclass(frozen=True)
class Loop:
    """A sub-jaxpr that runs several times, from constants and a carry to a carry."""

    body: Body
    n_consts: int
    n_carry: int
    groups: tuple[int, int]  # the sizes of the first two of three groups of inputs

    def split(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Split the inputs of the equation into the three groups."""
        first, end = self.groups[0], sum(self.groups)
        return list(inputs[:first]), list(inputs[first:end]), list(inputs[end:])

    @property
    def unchanged(self) -> list[bool]:
        """Which values of the carry the body returns unchanged, so that they are constant."""
        carried = self.body.jaxpr.invars[self.n_consts :][: self.n_carry]
        return [new is old for old, new in zip(carried, self.body.jaxpr.outvars, strict=False)]


@dataclasses.dataclass(frozen=True)
class Scan(Loop):
    """A loop over slices. Its inputs are constants, a carry, and scanned arrays."""

    length: int


@dataclasses.dataclass(frozen=True)
class While(Loop):
    """A loop with a condition. Its inputs are constants of both parts, and a carry."""

    test: Body


@dataclasses.dataclass(frozen=True)
class Cond:
    """Sub-jaxprs of which one runs."""

    branches: tuple[Body, ...]


@dataclasses.dataclass(frozen=True)
class ShardMap:
    """A sub-jaxpr that runs on every shard."""

    body: Body
    in_specs: tuple[Any, ...]
    axis_names: frozenset[str]


def _reads(eqn: Any, *names: str) -> bool:
    return set(names) <= set(eqn.params)


def open_call(eqn: Any) -> Body | None:
    """`jit`, a plain call, or a function with a custom derivative."""
    for name in ("call_jaxpr", "jaxpr"):
        if _reads(eqn, name):
            body = Body.of(eqn.params[name])
            return body if len(body.jaxpr.invars) == len(eqn.invars) else None
    return None


def open_remat(eqn: Any) -> Body | None:
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
    n_consts = n_whole - n_carry
    if n_consts < 0 or not all(whole_in[:n_whole]) or not all(whole_out[:n_carry]):
        return None
    return Scan(body, n_consts, n_carry, (n_consts, n_carry), eqn.params["length"])


def open_while(eqn: Any) -> While | None:
    """`while`, with its condition and its body."""
    if not _reads(eqn, "cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"):
        return None
    params = eqn.params
    test, body = Body.of(params["cond_jaxpr"]), Body.of(params["body_jaxpr"])
    n_test, n_consts = params["cond_nconsts"], params["body_nconsts"]
    return While(body, n_consts, len(body.jaxpr.outvars), (n_test, n_consts), test)


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
    return ShardMap(Body.of(params["jaxpr"]), tuple(params["in_specs"]), names)
