"""Activations by the names that `config.json` has for them, the soft cap, and constant factors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Compute cap * tanh(x / cap), which lies between -cap and cap; None: return x.

    Example:
      >>> float(soft_cap(jnp.float32(1e6), 30.0))
      30.0
    """
    if cap is None:
        return x
    return (jnp.tanh(x.astype(jnp.float32) / jnp.float32(cap)) * jnp.float32(cap)).astype(x.dtype)


def multiplied(x: jax.Array, factor: float) -> jax.Array:
    """Multiply by a constant in float32, and round to x's dtype once.

    Example:
      >>> import jax.numpy as jnp
      >>> float(multiplied(jnp.bfloat16(3.0), 0.5))
      1.5
    """
    if factor == 1.0:
        return x
    return (x.astype(jnp.float32) * jnp.float32(factor)).astype(x.dtype)
