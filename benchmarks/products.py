"""Dense layers with LoRA written into them: what a user without a library would write.

Each product takes x (..., in), kernel (in, out), a (in, rank), b (rank, out) and the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Product = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, float], jax.Array]


def factored(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """The textbook form."""
    return x @ w + scale * ((x @ a) @ b)


def scale_inside(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """The same with the scale on the (..., rank) array."""
    return x @ w + (scale * (x @ a)) @ b


def flattened(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """The same with all tokens on one axis, which XLA's products on CPU are faster at."""
    rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
    return (rows @ w + (scale * (rows @ a)) @ b).reshape(*x.shape[:-1], -1)


def materialised(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """The update formed, and differentiated as it stands: a gradient of the kernel's size."""
    return x @ (w + scale * (a @ b))


class LoraDense(nn.Module):
    """A dense layer with its factors in a collection of their own.

    Args:
      features: Channels out.
      rank: Rank of the factors.
      scale: alpha / rank.
      product: How kernel and factors meet x.
      dtype: Type of the kernel and of the arithmetic.
    """

    features: int
    rank: int
    scale: float
    product: Product
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., in) -> (..., features)."""
        channels = x.shape[-1]
        initial = nn.initializers.lecun_normal()
        w = self.param("kernel", initial, (channels, self.features), self.dtype)
        a = self.variable("lora", "a", jnp.zeros, (channels, self.rank)).value
        b = self.variable("lora", "b", jnp.zeros, (self.rank, self.features)).value
        # Factors are kept in float32 and meet x in its own type.
        return self.product(x, w, a.astype(self.dtype), b.astype(self.dtype), self.scale)


class FlatDense(nn.Module):
    """`nn.Dense` with all tokens on one axis: how much of a gain is only the reshape."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., in) -> (..., features)."""
        initial = nn.initializers.lecun_normal()
        w = self.param("kernel", initial, (x.shape[-1], self.features), self.dtype)
        return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], -1)
