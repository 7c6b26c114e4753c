"""Count the floating-point operations of the matmuls of a traced function."""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: Any) -> float:
    """Count the FLOPs of the matmuls of a jaxpr; a multiply-add counts as two.

    The body of a scan counts once per iteration, and a `cond` counts its most expensive branch. The
    body of a `while` counts once, as its iterations are unknown. Matmuls inside a fused kernel,
    such as flash attention, do not count.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def f(x):  # (2, 3)
      ...     return jax.lax.scan(lambda x, _: (x @ jnp.ones((3, 3)), None), x, length=5)[0]
      >>> matmul_flops(jax.make_jaxpr(f)(jnp.ones((2, 3))).jaxpr)  # 5 * 2 * (2 * 3 * 3)
      180.0
    """
    return float(sum(map(_equation_flops, jaxpr.eqns)))


def _equation_flops(eqn: Any) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lengths = [eqn.invars[0].aval.shape[axis] for axis in contracted]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lengths)
    if name == "pallas_call":
        return 0.0
    inner = [matmul_flops(jaxpr) for value in eqn.params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * eqn.params.get("length", 1) if name == "scan" else sum(inner)


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [jaxpr for each in value for jaxpr in _jaxprs(each)]
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    return [value] if isinstance(value, core.Jaxpr) else []
