"""How the inputs and outputs of a loop are laid out."""

from __future__ import annotations

from typing import Any

from jax_lora.transform.interpreter import opened


def scan_layout(eqn: Any) -> tuple[int, int] | None:
    """Tell how many inputs of a scan are constants and how many are carried.

    It follows from the ranks, which no version of JAX has changed: what is scanned over loses an
    axis on its way into the body, and what is carried keeps its rank on its way out.
    """
    if not {"jaxpr", "length", "reverse", "unroll"} <= set(eqn.params):
        return None
    body, _ = opened(eqn.params["jaxpr"])
    whole_in = [
        outer.aval.ndim == inner.aval.ndim
        for outer, inner in zip(eqn.invars, body.invars, strict=True)
    ]
    whole_out = [
        outer.aval.ndim == inner.aval.ndim
        for outer, inner in zip(eqn.outvars, body.outvars, strict=True)
    ]
    n_whole, n_carry = sum(whole_in), sum(whole_out)
    in_order = all(whole_in[:n_whole]) and all(whole_out[:n_carry]) and n_whole >= n_carry
    return (n_whole - n_carry, n_carry) if in_order else None
