"""The two normalisations of Transformers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["LayerNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """Divide by the root mean square over channels, then scale each channel.

    Attributes:
      eps: added to the mean square.
      offset: added to the scale; Gemma keeps scales as their difference from 1.
      wide_scale: whether to scale in float32, before the cast to x's dtype, and not after it.
      param_dtype: dtype that `init` gives the scale.
    """

    eps: float
    offset: float = 0.0
    wide_scale: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x: (..., channels)."""
        first = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", first, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)  # (..., 1)
        normed = wide * jax.lax.rsqrt(power + jnp.float32(self.eps))
        dtype = jnp.float32 if self.wide_scale else x.dtype
        normed, scale = normed.astype(dtype), scale.astype(dtype)
        scale = scale + jnp.asarray(self.offset, dtype) if self.offset else scale
        return (normed * jnp.broadcast_to(scale, normed.shape)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Subtract the mean over channels, divide by the deviation, then scale and shift.

    Attributes:
      eps: added to the variance.
      param_dtype: dtype that `init` gives scale and bias.
    """

    eps: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x: (..., channels)."""
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)  # (..., 1)
        normed = centred * jax.lax.rsqrt(variance + jnp.float32(self.eps))
        scale, bias = (jnp.broadcast_to(p.astype(jnp.float32), x.shape) for p in (scale, bias))
        return (normed * scale + bias).astype(x.dtype)
