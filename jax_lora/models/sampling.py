"""Sampling of the next token: temperature, top-k and top-p, with one key per sequence."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Choice(NamedTuple):
    """The settings of sampling, as arrays: other values never recompile a function."""

    keys: jax.Array  # (batch,) keys, so that no sequence's samples depend on the other sequences
    temperature: jax.Array  # float32 scalar above 0
    top_k: jax.Array  # int32 scalar of at least 1; the vocabulary's size or more keeps all tokens
    top_p: jax.Array  # float32 scalar above 0; 1 keeps all tokens


def filter_logits(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Divide logits (..., vocabulary) by the temperature, then apply top-k, then top-p.

    Tokens that tie with the k-th most likely are kept. The token that reaches top_p is kept, so at
    least one token remains. The others are minus infinity in the float32 result.

    Reference:
      Fan et al. (arXiv:1805.04833), section 5.4, for top-k; Holtzman et al. (arXiv:1904.09751),
      section 3.1, for top-p.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
      >>> kept = filter_logits(logits, jnp.float32(1.0), jnp.int32(3), jnp.float32(0.7))
      >>> jnp.isfinite(kept).tolist()
      [False, False, True, True]
    """
    scaled = logits.astype(jnp.float32) / temperature.astype(jnp.float32)
    order = jnp.argsort(scaled, axis=-1)  # the least likely token first
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    size = ranked.shape[-1]
    place = size - jnp.clip(top_k, 1, size)
    kth = jax.lax.dynamic_slice_in_dim(ranked, place, 1, axis=-1)  # (..., 1)
    ranked = jnp.where(ranked < kth, -jnp.inf, ranked)
    # Drop a token if it and the less likely ones sum to no more than 1 - top_p.
    weight = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    kept = (weight > 1 - top_p) | (top_p >= 1)
    kept = (kept & (ranked > -jnp.inf)).at[..., -1].set(True)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, scaled, -jnp.inf)


def draw(logits: jax.Array, choice: Choice, step: jax.Array) -> jax.Array:
    """Sample one token per sequence from logits (batch, vocabulary), after `step` new tokens.

    A sequence's token depends only on its key, its logits and the step.
    """
    filtered = filter_logits(logits, choice.temperature, choice.top_k, choice.top_p)

    def one(key: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, step), row)

    return jax.vmap(one)(choice.keys, filtered).astype(jnp.int32)
