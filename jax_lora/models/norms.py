"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """Divide by the root mean square over channels, then scale each channel."""

    eps: float  # added to the mean square
    offset: float = 0.0  # added to the scale; Gemma stores scales as their difference from 1
    wide_scale: bool = False  # whether to scale in float32, before the cast to x's dtype
    param_dtype: Any = jnp.float32  # dtype in which `init` makes the scale

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x: (..., channels)."""
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
    """Subtract the mean over channels, divide by the deviation, then scale and shift."""

    eps: float  # added to the variance
    param_dtype: Any = jnp.float32  # dtype in which `init` makes scale and bias

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x: (..., channels)."""
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)  # (..., 1)
        normed = centered * jax.lax.rsqrt(variance + jnp.float32(self.eps))
        scale, bias = (jnp.broadcast_to(p.astype(jnp.float32), x.shape) for p in (scale, bias))
        return (normed * scale + bias).astype(x.dtype)
