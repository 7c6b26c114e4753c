"""Self-attention of decoders and encoders, with a KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_lora.models.activation_sharding import pin_heads
from jax_lora.models.activations import soft_cap
from jax_lora.models.attention_mask import BLOCKS, CUDNN, SPLASH, AttentionMask
from jax_lora.models.blockwise_attention import blockwise_attention
from jax_lora.models.rotary import apply_rotary

# The keys and values of one layer, each (batch, length, key-value heads, head_dim).
LayerCache = tuple[jax.Array, jax.Array]


class LayerContext(NamedTuple):
    """The inputs that all layers share."""

    cos: jax.Array | None = None  # (batch, tokens, rotary_dim / 2); None: no rotary positions
    sin: jax.Array | None = None  # same shape
    mask: AttentionMask | jax.Array | None = None  # from `make_masks`, or booleans; None: causal
    filled: jax.Array | None = None  # int32 scalar, the cache's filled slots; None without a cache
    query_scale: jax.Array | None = None  # (batch, tokens) float32, on the scores


class Attention(nn.Module):
    """Self-attention with one kernel each for queries, keys and values, or one for all three."""

    dense: Callable[..., nn.Dense]  # makes a dense layer; see `dense_maker`
    names: tuple[str, ...]  # (query, key, value, output), or (all three, output)
    heads: int
    groups: int  # key-value heads
    head_dim: int
    bias: bool = False  # of queries, keys and values
    out_bias: bool = False  # of the output projection
    qk_norm: Callable[..., nn.Module] | None = None  # makes their norm; None: no norm
    joint_norm: bool = False  # whether it is over all heads together
    scale: float | None = None  # factor on the scores; None: 1 / sqrt(head_dim)
    soft_cap: float | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # (batch, tokens, hidden)
        context: LayerContext,
        cache: LayerCache | None = None,
        divisor: jax.Array | None = None,  # scalar that divides the scores, or None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend to x and the tokens in the cache.

        Returns:
          (batch, tokens, hidden), and the layer's updated cache, if any.
        """
        *inputs, output = self.names
        queries, keys = self.heads * self.head_dim, self.groups * self.head_dim
        if len(inputs) == 1:
            qkv = self.dense(queries + 2 * keys, use_bias=self.bias, name=inputs[0])(x)
            parts = jnp.split(qkv, [queries, queries + keys], axis=-1)
        else:
            sizes = zip(inputs, (queries, keys, keys), strict=True)
            parts = [self.dense(n, use_bias=self.bias, name=name)(x) for name, n in sizes]
        if self.joint_norm:
            parts[:2] = self._normalized(*parts[:2])
        heads = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in parts)
        q, k, v = map(pin_heads, heads)
        if not self.joint_norm:
            q, k = self._normalized(q, k)
        if context.cos is not None and context.sin is not None:
            q = apply_rotary(q, context.cos, context.sin)  # (batch, tokens, heads, head_dim)
            k = apply_rotary(k, context.cos, context.sin)  # (batch, tokens, groups, head_dim)
        if context.query_scale is not None:
            q = q * context.query_scale.astype(q.dtype)[:, :, None, None]
        if divisor is not None:  # dividing queries divides their scores
            q = q / divisor.astype(q.dtype)
        if self.qk_norm is None:  # otherwise `_normalized` names them
            q, k = checkpoint_name(q, "query"), checkpoint_name(k, "key")
        v = checkpoint_name(v, "value")
        k, v, cache = update_cache(cache, k, v, context.filled)  # (batch, length, groups, head_dim)
        y = attend(q, k, v, context.mask, scale=self.scale, soft_cap=self.soft_cap)
        y = pin_heads(y).reshape(*x.shape[:2], queries)
        return self.dense(x.shape[-1], use_bias=self.out_bias, name=output)(y), cache

    def _normalized(self, q: jax.Array, k: jax.Array) -> list[jax.Array]:
        if self.qk_norm is None:
            return [q, k]
        # The backward pass of the norms reads their inputs, so these are saved by name.
        q, k = checkpoint_name(q, "query"), checkpoint_name(k, "key")
        return [self.qk_norm(name="q_norm")(q), self.qk_norm(name="k_norm")(k)]


def update_cache(
    cache: LayerCache | None, k: jax.Array, v: jax.Array, filled: jax.Array | None
) -> tuple[jax.Array, jax.Array, LayerCache | None]:
    """Append new keys and values, (batch, tokens, groups, head_dim), to a layer's cache.

    `filled` is the number of slots in use; without a cache, keys and values are returned unchanged.
    Return all keys and values, (batch, length, groups, head_dim) each in k's dtype, and the new
    cache.
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
    mask: AttentionMask | jax.Array | None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Compute each query's mean of the values, weighted by the softmax of its scores.

    Args:
      q: (batch, tokens, heads, head_dim).
      k: (batch, keys, groups, head_dim); each group serves heads / groups consecutive heads.
      v: Same shape.
      mask: From `make_masks`, which determines the kernel; or (batch or 1, 1, tokens, keys)
        booleans, True where a query attends to a key; None: causal.
      scale: Factor on the scores; None: 1 / sqrt(head_dim).
      soft_cap: c in c * tanh(score / c); None: no cap.

    Returns:
      (batch, tokens, heads, head_dim), in q's dtype.

    Reference:
      Vaswani et al. (arXiv:1706.03762), equation 1; Gemma 2 (arXiv:2408.00118), section 2.
    """
    if isinstance(mask, AttentionMask):
        factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        if mask.kernel == CUDNN:
            return _cudnn_attention(q, k, v, mask, factor)
        if mask.kernel == SPLASH:
            from jax_lora.models.splash_attention import splash_attention  # imports Pallas

            return splash_attention(q, k, v, mask, factor, soft_cap)
        if mask.kernel == BLOCKS:
            return blockwise_attention(
                q, k, v, mask.segments, mask.recent, scale=factor, soft_cap=soft_cap
            )
        mask = mask.dense
    if soft_cap is not None:
        return _attend_capped(q, k, v, mask, scale, soft_cap)
    # JAX promotes bfloat16 scores to float32 here, which is an error under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=mask is None)


def _cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, scale: float
) -> jax.Array:
    """Attend with cuDNN's fused kernel, which needs an even number of tokens."""
    tokens = q.shape[1]
    # A causal mask hides tokens after the end, so padding on the right needs no mask.
    q, k, v = (pad_tokens(x, 1, 2) for x in (q, k, v))
    bias = None if mask.bias is None else pad_tokens(pad_tokens(mask.bias, 2, 2), 3, 2)
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias,
        scale=scale,
        is_causal=True,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )
    return y[:, :tokens]


def pad_tokens(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Pad an axis with zeros on the right, to a multiple of `multiple`."""
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    return jnp.pad(x, [(0, missing if each == axis else 0) for each in range(x.ndim)])


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
