"""Causal attention in blocks, in pure JAX: scores are never in memory as a whole.

For everything that a device's fused kernel does not support: soft caps, windows that differ between
layers, float32, large heads. Blocks of keys that no query of a block sees are skipped.

Reference:
    Dao, FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_lora.models.activations import soft_cap

Array = jax.Array


class _Settings(NamedTuple):
    scale: float
    soft_cap: float | None
    block: int


def blockwise_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None = None,
    window: Array | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
    block: int = 512,
) -> Array:
    """Attend causally, a block of queries and a block of keys at a time, as `attend` does.

    `segments` are as in `AttentionMask`, and `window` is its `recent`; `block` is in tokens.
    """
    batch, tokens, heads, channels = q.shape
    groups = k.shape[2]
    block = min(block, -(-tokens // 8) * 8)
    missing = -tokens % block
    if segments is None:
        segments = jnp.zeros((batch, tokens), jnp.int32)
    # The last block is filled with tokens of a segment of their own.
    segments = jnp.pad(segments, [(0, 0), (0, missing)], constant_values=-2)
    q, k, v = (jnp.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) for x in (q, k, v))
    q = q.reshape(batch, -1, groups, heads // groups, channels)  # (b, t, g, h/g, c)
    window = jnp.int32(tokens) if window is None else window
    settings = _Settings(scale, soft_cap, block)
    y: Array = _attention(settings, q, k, v, segments, window)
    return y.reshape(batch, -1, heads, channels)[:, :tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings: _Settings, *args: Array) -> Array:
    return _forward(settings, *args)[0]


def _cut(x: Array, index: Array, block: int) -> Array:
    """Return a block of x along its second axis."""
    return lax.dynamic_slice_in_dim(x, index * block, block, axis=1)


def _first_blocks(settings: _Settings, segments: Array, window: Array) -> Array:
    """Return, per block of queries, the first block of keys that one of them sees: (blocks,)."""
    block = settings.block
    cut = segments.reshape(segments.shape[0], -1, block)  # (b, blocks, block)
    least, most = cut.min(axis=-1), cut.max(axis=-1)  # (b, blocks)
    meets = (least[:, :, None] <= most[:, None, :]) & (least[:, None, :] <= most[:, :, None])
    number = jnp.arange(cut.shape[1], dtype=jnp.int32)
    query, key = number[:, None], number[None, :]
    near = (query * block - (key + 1) * block + 1 < window) & (key <= query)
    return jnp.argmax(meets.any(axis=0) & near, axis=1).astype(jnp.int32)


def _scores(
    settings: _Settings, q: Array, k: Array, segments: Array, window: Array, i: Array, j: Array
) -> tuple[Array, Array]:
    """Compute a block of scores, and which of them are visible.

    Returns:
      (b, g, h/g, queries, keys) float32 with soft cap, and (b, 1, 1, queries, keys) booleans.
    """
    block = settings.block
    raw = jnp.einsum("btghc,bsgc->bghts", q, k, preferred_element_type=jnp.float32)
    scores = soft_cap(raw * jnp.float32(settings.scale), settings.soft_cap)
    inside = jnp.arange(block, dtype=jnp.int32)
    rows, columns = (i * block + inside)[:, None], (j * block + inside)[None, :]
    seen = (columns <= rows) & (rows - columns < window)  # (queries, keys)
    query, key = _cut(segments, i, block), _cut(segments, j, block)
    same = query[:, :, None] == key[:, None, :]  # (b, queries, keys)
    return scores, (seen[None] & same)[:, None, None]


def _forward(
    settings: _Settings, q: Array, k: Array, v: Array, segments: Array, window: Array
) -> tuple[Array, Array]:
    """Return the output in q's shape, and log-sum-exps (blocks, b, g, h/g, queries)."""
    block = settings.block
    first = _first_blocks(settings, segments, window)

    def of_queries(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
        q_i = _cut(q, i, block)  # (b, block, g, h/g, c)
        shape = (q.shape[0], *q.shape[2:4], block)
        start = (
            jnp.full(shape, -jnp.inf, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, q.shape[-1]), jnp.float32),
        )

        def add_keys(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            most, total, y = carry
            scores, seen = _scores(settings, q_i, _cut(k, j, block), segments, window, i, j)
            scores = jnp.where(seen, scores, jnp.full_like(scores, -jnp.inf))
            higher = jnp.maximum(most, scores.max(axis=-1))
            # A row that has seen no key yet: its maximum stays -inf, its sums stay 0.
            base = jnp.where(jnp.isinf(higher), jnp.zeros_like(higher), higher)
            weights = jnp.exp(scores - base[..., None])  # (b, g, h/g, queries, keys)
            keep = jnp.exp(most - base)
            part = jnp.einsum(
                "bghts,bsgc->bghtc",
                weights.astype(v.dtype),
                _cut(v, j, block),
                preferred_element_type=jnp.float32,
            )
            return higher, total * keep + weights.sum(axis=-1), y * keep[..., None] + part

        most, total, y = lax.fori_loop(first[i], i + 1, add_keys, start)
        y = (y / total[..., None]).astype(q.dtype)
        return None, (y, most + jnp.log(total))

    numbers = jnp.arange(q.shape[1] // block, dtype=jnp.int32)
    _, (y, logsumexp) = lax.scan(of_queries, None, numbers)  # (blocks, b, g, h/g, block, c)
    y = y.transpose(1, 0, 4, 2, 3, 5).reshape(q.shape)
    return y, logsumexp


def _save(settings: _Settings, *args: Array) -> tuple[Array, Any]:
    y, logsumexp = _forward(settings, *args)
    y = checkpoint_name(y, "attention_output")
    return y, (*args, y, checkpoint_name(logsumexp, "attention_logsumexp"))


def _backward(settings: _Settings, saved: Any, dy: Array) -> tuple[Array | None, ...]:
    q, k, v, segments, window, y, logsumexp = saved
    block = settings.block
    first = _first_blocks(settings, segments, window)
    wide = jnp.float32
    # (b, t, g, h/g): the part of the softmax's gradient that is common to a row
    common = jnp.sum(dy.astype(wide) * y.astype(wide), axis=-1)

    def of_queries(carry: Any, inputs: Any) -> tuple[Any, Array]:
        i, logsumexp_i = inputs
        q_i, dy_i = _cut(q, i, block), _cut(dy, i, block)
        common_i = _cut(common, i, block).transpose(0, 2, 3, 1)  # (b, g, h/g, block)

        def add_keys(j: Array, carry: Any) -> Any:
            dq, dk, dv = carry
            k_j, v_j = _cut(k, j, block), _cut(v, j, block)
            scores, seen = _scores(settings, q_i, k_j, segments, window, i, j)
            weights = jnp.exp(scores - logsumexp_i[..., None])
            weights = jnp.where(seen, weights, jnp.zeros_like(weights))
            dweights = jnp.einsum("btghc,bsgc->bghts", dy_i, v_j, preferred_element_type=wide)
            dscores = weights * (dweights - common_i[..., None])
            if settings.soft_cap is not None:
                slope = scores / jnp.float32(settings.soft_cap)
                dscores = dscores * (jnp.float32(1) - slope * slope)
            dscores = (dscores * jnp.float32(settings.scale)).astype(q.dtype)
            narrow = weights.astype(q.dtype)
            dq = dq + jnp.einsum("bghts,bsgc->btghc", dscores, k_j, preferred_element_type=wide)
            dk_j = jnp.einsum("bghts,btghc->bsgc", dscores, q_i, preferred_element_type=wide)
            dv_j = jnp.einsum("bghts,btghc->bsgc", narrow, dy_i, preferred_element_type=wide)
            return dq, _add(dk, dk_j, j, block), _add(dv, dv_j, j, block)

        start = (jnp.zeros(q_i.shape, wide), *carry)
        dq, *carry = lax.fori_loop(first[i], i + 1, add_keys, start)
        return tuple(carry), dq.astype(q.dtype)

    zeros = jnp.zeros(k.shape, wide)
    numbers = jnp.arange(q.shape[1] // block, dtype=jnp.int32)
    (dk, dv), dq = lax.scan(of_queries, (zeros, zeros), (numbers, logsumexp))
    dq = dq.swapaxes(0, 1).reshape(q.shape)  # (blocks, b, block, ...) -> (b, t, ...)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _add(total: Array, part: Array, j: Array, block: int) -> Array:
    return lax.dynamic_update_slice_in_dim(total, _cut(total, j, block) + part, j * block, axis=1)


_attention.defvjp(_save, _backward)
