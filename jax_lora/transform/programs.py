"""Sub-jaxprs of equations (jit, scan, cond, ...), and the inputs that each of them receives.

If a version of JAX has other parameters than expected, the result is None, and the equation is
treated like one without a rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax_lora.transform.equations import opened


@dataclasses.dataclass(frozen=True)
class Body:
    """A sub-jaxpr.

    Args:
      jaxpr: The open jaxpr.
      consts: Its constants.
    """

    jaxpr: Any
    consts: Sequence[Any]

    @classmethod
    def of(cls, program: Any) -> Body:
        """Split an open or closed jaxpr."""
        return cls(*opened(program))


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


def unchanged(body: Body, n_consts: int, n_carry: int) -> list[bool]:
    """Tell which values of a carry the body returns unchanged, so that they are constant."""
    jaxpr = body.jaxpr
    return [jaxpr.outvars[i] is jaxpr.invars[n_consts + i] for i in range(n_carry)]


def _reads(eqn: Any, *names: str) -> bool:
    return set(names) <= set(eqn.params)


def open_jit(eqn: Any) -> Call | None:
    """`jit`."""
    return Call(Body.of(eqn.params["jaxpr"])) if _reads(eqn, "jaxpr") else None


def open_remat(eqn: Any) -> Call | None:
    """`checkpoint`, which JAX has also called `remat`."""
    readable = _reads(eqn, "jaxpr", "prevent_cse", "policy")
    return Call(Body.of(eqn.params["jaxpr"])) if readable else None


def open_call(eqn: Any) -> Call | None:
    """A plain call, or a function with a custom derivative."""
    for name in ("call_jaxpr", "jaxpr"):
        if _reads(eqn, name):
            body = Body.of(eqn.params[name])
            return Call(body) if len(body.jaxpr.invars) == len(eqn.invars) else None
    return None


def open_scan(eqn: Any) -> Scan | None:
    """`scan`. The numbers of constants and carried values follow from the ranks.

    In every version of JAX, a scanned array loses an axis in the body, and a carried value keeps
    its rank.
    """
    if not _reads(eqn, "jaxpr", "length", "reverse", "unroll"):
        return None
    body = Body.of(eqn.params["jaxpr"])
    whole_in = [
        outer.aval.ndim == inner.aval.ndim
        for outer, inner in zip(eqn.invars, body.jaxpr.invars, strict=True)
    ]
    whole_out = [
        outer.aval.ndim == inner.aval.ndim
        for outer, inner in zip(eqn.outvars, body.jaxpr.outvars, strict=True)
    ]
    n_whole, n_carry = sum(whole_in), sum(whole_out)
    in_order = all(whole_in[:n_whole]) and all(whole_out[:n_carry]) and n_whole >= n_carry
    return Scan(body, n_whole - n_carry, n_carry, eqn.params["length"]) if in_order else None


def open_while(eqn: Any) -> While | None:
    """`while`."""
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
    """`shard_map`."""
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
