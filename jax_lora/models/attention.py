"""Grouped-query attention with rotary positions, and the switches that decoders turn."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_lora.models.activations import soft_cap
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.norms import RMSNorm
from jax_lora.models.rotary import apply_rotary

__all__ = ["Attention", "Context", "Memory", "attend", "linear", "remember"]

# One layer's keys and values, (batch, length, key-value heads, head_dim) each.
Memory = tuple[jax.Array, jax.Array]


class Context(NamedTuple):
    """What every layer shares: rotation, which keys a query may see, where the cache stands."""

    cos: jax.Array  # (batch, tokens, rotated channels / 2)
    sin: jax.Array
    mask: jax.Array | None  # (batch, 1, tokens, keys) booleans; None: plainly causal
    filled: jax.Array | None  # int32 scalar; None without a cache


def linear(config: Any, features: int, bias: bool, param_dtype: Any) -> nn.Dense:
    """A dense layer with the configuration's initial deviation."""
    initial = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, use_bias=bias, kernel_init=initial, param_dtype=param_dtype)


class Attention(nn.Module):
    """Queries, keys and values by three kernels, or by one (`fused`), and the output's kernel.

    Attributes:
      config: sizes.
      param_dtype: dtype that `init` gives the parameters.
      bias: whether queries, keys and values have a bias.
      out_bias: whether the output has one.
      fused: whether one kernel `qkv_proj` makes all three.
      qk_norm: the normalisation of each query's and key's channels, or None.
      scale: factor on the scores; None: 1 / sqrt(head_dim).
      soft_cap: scores are squeezed into plus and minus this; None: as they are.
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
        self, x: jax.Array, context: Context, memory: Memory | None
    ) -> tuple[jax.Array, Memory | None]:
        """x: (batch, tokens, hidden) -> the same shape, and the layer's cache if it has one."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (part.reshape(heads) for part in self._project(x))  # (b, t, h or g, d)
        if self.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rotary(q, context.cos, context.sin)  # (b, t, h, d)
        k = apply_rotary(k, context.cos, context.sin)  # (b, t, g, d)
        if memory is not None and context.filled is not None:
            memory = remember(memory, k, v, context.filled)
            k, v = (part.astype(x.dtype) for part in memory)  # (b, length, g, d)
        y = attend(q, k, v, context.mask, scale=self.scale, soft_cap=self.soft_cap)
        return self.o_proj(y.reshape(*x.shape[:2], -1)), memory

    def _project(self, x: jax.Array) -> list[jax.Array]:
        if not self.fused:
            return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        c = self.config
        queries, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return jnp.split(self.qkv_proj(x), [queries, queries + groups], axis=-1)


def remember(memory: Memory, k: jax.Array, v: jax.Array, filled: jax.Array) -> Memory:
    """Write new keys and values behind those that a layer's cache holds."""
    keys, values = memory
    zero = jnp.zeros_like(filled)
    start = (zero, filled, zero, zero)
    keys = jax.lax.dynamic_update_slice(keys, k.astype(keys.dtype), start)
    values = jax.lax.dynamic_update_slice(values, v.astype(values.dtype), start)
    return keys, values


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Each query's mean of the values, weighted by the softmax of its scores.

    Args:
      q: (batch, tokens, heads, head_dim).
      k: (batch, keys, groups, head_dim); each group serves heads / groups heads in a row.
      v: same shape.
      mask: (batch or 1, 1, tokens, keys), True where a query sees a key; None: plainly causal.
      scale: factor on the scores; None: 1 / sqrt(head_dim).
      soft_cap: c in c * tanh(score / c); None: none.

    Returns:
      (batch, tokens, heads, head_dim), in q's dtype.

    Reference:
      Vaswani et al. (arXiv:1706.03762), equation 1; Gemma 2 (arXiv:2408.00118), section 2.
    """
    if soft_cap is not None:
        return _attend_capped(q, k, v, mask, scale, soft_cap)
    # Its own promotion of bfloat16 scores to float32 is refused by strict dtype promotion.
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
