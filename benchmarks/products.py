"""Dense layers with hand-written LoRA, as users write them without a library.

The arguments of each product are x (..., in), kernel (in, out), a (in, rank), b (rank, out) and the
scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Product = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, float], jax.Array]


def factored(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Compute the usual implementation."""
    return x @ w + scale * ((x @ a) @ b)


def scale_inside(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Apply the scale to the (..., rank) array."""
    return x @ w + (scale * (x @ a)) @ b


def flattened(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Flatten batch and sequence axes, which makes matmuls faster in XLA for CPU."""
    rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
    return (rows @ w + (scale * (rows @ a)) @ b).reshape(*x.shape[:-1], -1)


def materialized(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Materialize the update; its gradient has the size of the kernel."""
    return x @ (w + scale * (a @ b))


class LoraDense(nn.Module):
    """A dense layer with its factors in the collection "lora".

    Args:
      features: Output features.
      rank: Rank of the factors.
      scale: alpha / rank.
      product: Computes the output.
      dtype: Dtype of the kernel and of the computation.
    """

    features: int
    rank: int
    scale: float
    product: Product
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (..., in) to (..., features)."""
        channels = x.shape[-1]
        initial = nn.initializers.lecun_normal()
        w = self.param("kernel", initial, (channels, self.features), self.dtype)
        a = self.variable("lora", "a", jnp.zeros, (channels, self.rank)).value
        b = self.variable("lora", "b", jnp.zeros, (self.rank, self.features)).value
        # Factors are stored in float32 and cast for the computation.
        return self.product(x, w, a.astype(self.dtype), b.astype(self.dtype), self.scale)


class FlatDense(nn.Module):
    """`nn.Dense` with flattened batch and sequence axes, to measure the gain from flattening."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (..., in) to (..., features)."""
        initial = nn.initializers.lecun_normal()
        w = self.param("kernel", initial, (x.shape[-1], self.features), self.dtype)
        return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], -1)
