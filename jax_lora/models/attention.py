"""Grouped-query attention with rotary positions, and the switches of its variants."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_lora.models.activations import soft_cap
from jax_lora.models.checkpoint_model import linear
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.norms import RMSNorm
from jax_lora.models.rotary import apply_rotary

__all__ = ["Attention", "LayerCache", "LayerContext", "attend", "update_cache"]

# The keys and values of one layer, each (batch, length, key-value heads, head_dim).
LayerCache = tuple[jax.Array, jax.Array]


class LayerContext(NamedTuple):
    """The inputs that every decoder layer shares.

    Attributes:
      cos: (batch, tokens, rotary_dim / 2), from `rotary_angles`; None without rotary positions.
      sin: Same shape.
      mask: (batch or 1, 1, tokens, keys) booleans, True where a query attends to a key; None:
        causal.
      filled: int32 scalar, the cache's filled slots; None without a cache.
    """

    cos: jax.Array | None
    sin: jax.Array | None
    mask: jax.Array | None
    filled: jax.Array | None


class Attention(nn.Module):
    """Attention with one kernel each for queries, keys and values, or one for all (`fused`).

    Attributes:
      config: Sizes.
      param_dtype: Dtype in which `init` makes the parameters.
      bias: Whether queries, keys and values have a bias.
      out_bias: Whether the output projection has a bias.
      fused: Whether one kernel `qkv_proj` makes queries, keys and values.
      qk_norm: Normalization of each query's and key's channels; None: no normalization.
      scale: Factor on the scores; None: 1 / sqrt(head_dim).
      soft_cap: Soft cap on the scores; None: no cap.
    """

    config: DecoderConfig
    param_dtype: Any
    bias: bool = False
    out_bias: bool = False
    fused: bool = False
    qk_norm: RMSNorm | None = None
    scale: float | None = None
    soft_cap: float | None = None

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        queries, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        if self.fused:
            self.qkv_proj = linear(c, queries + 2 * groups, self.bias, dtype)
        else:
            self.q_proj = linear(c, queries, self.bias, dtype)
            self.k_proj = linear(c, groups, self.bias, dtype)
            self.v_proj = linear(c, groups, self.bias, dtype)
        self.o_proj = linear(c, c.hidden_size, self.out_bias, dtype)
        if self.qk_norm is not None:
            self.q_norm, self.k_norm = self.qk_norm.clone(), self.qk_norm.clone()

    def __call__(
        self, x: jax.Array, context: LayerContext, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """(batch, tokens, hidden) -> the same shape, and the layer's updated cache, if any."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (part.reshape(heads) for part in self._project(x))  # (b, t, h or g, d)
        if self.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.cos is not None and context.sin is not None:
            q = apply_rotary(q, context.cos, context.sin)  # (b, t, h, d)
            k = apply_rotary(k, context.cos, context.sin)  # (b, t, g, d)
        k, v, cache = update_cache(cache, k, v, context.filled)  # (b, length, g, d) with a cache
        y = attend(q, k, v, context.mask, scale=self.scale, soft_cap=self.soft_cap)
        return self.o_proj(y.reshape(*x.shape[:2], -1)), cache

    def _project(self, x: jax.Array) -> list[jax.Array]:
        if not self.fused:
            return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        c = self.config
        queries, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return jnp.split(self.qkv_proj(x), [queries, queries + groups], axis=-1)


def update_cache(
    cache: LayerCache | None, k: jax.Array, v: jax.Array, filled: jax.Array | None
) -> tuple[jax.Array, jax.Array, LayerCache | None]:
    """Append new keys and values to a layer's cache.

    Args:
      cache: The layer's cache; None: keys and values are returned unchanged.
      k: (batch, tokens, groups, head_dim).
      v: Same shape.
      filled: int32 scalar, number of slots in use; None without a cache.

    Returns:
      All keys and values, (batch, length, groups, head_dim) each in k's dtype, and the new cache.
    """
    if cache is None or filled is None:
        return k, v, cache
    keys, values = cache
    zero = jnp.zeros_like(filled)
    start = (zero, filled, zero, zero)
    keys = jax.lax.dynamic_update_slice(keys, k.astype(keys.dtype), start)
    values = jax.lax.dynamic_update_slice(values, v.astype(values.dtype), start)
    return keys.astype(k.dtype), values.astype(v.dtype), (keys, values)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Compute each query's mean of the values, weighted by the softmax of its scores.

    Args:
      q: (batch, tokens, heads, head_dim).
      k: (batch, keys, groups, head_dim); each group serves heads / groups consecutive heads.
      v: Same shape.
      mask: (batch or 1, 1, tokens, keys), True where a query attends to a key; None: causal.
      scale: Factor on the scores; None: 1 / sqrt(head_dim).
      soft_cap: c in c * tanh(score / c); None: no cap.

    Returns:
      (batch, tokens, heads, head_dim), in q's dtype.

    Reference:
      Vaswani et al. (arXiv:1706.03762), equation 1; Gemma 2 (arXiv:2408.00118), section 2.
    """
    if soft_cap is not None:
        return _attend_capped(q, k, v, mask, scale, soft_cap)
    # JAX itself promotes bfloat16 scores to float32 here, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=mask is None)


def _attend_capped(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    scale: float | None,
    cap: float,
) -> jax.Array:
    batch, tokens, heads, channels = q.shape
    keys, groups = k.shape[1], k.shape[2]
    q = q.reshape(batch, tokens, groups, heads // groups, channels)
    scores = jnp.einsum("btghd,bkgd->bghtk", q, k, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(scale or 1.0 / math.sqrt(channels))
    scores = soft_cap(scores, cap)
    if mask is None:
        mask = jnp.tril(jnp.ones((tokens, keys), bool))[None, None]
    seen = jnp.broadcast_to(mask[:, :, None], scores.shape)
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
    y = jnp.einsum("bghtk,bkgd->btghd", weights.astype(v.dtype), v)
    return y.reshape(batch, tokens, heads, channels)
