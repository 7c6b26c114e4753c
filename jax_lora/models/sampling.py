"""Choosing the next token: temperature, top-k, top-p, and a draw of its own for every row."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Choice", "draw", "filter_logits"]


class Choice(NamedTuple):
    """How tokens are drawn. All of it is data: other values never compile another program.

    Attributes:
      keys: (rows,) keys, one a row, so that no row's draws depend on the rows beside it.
      temperature: float32 scalar above 0.
      top_k: int32 scalar of at least 1; the vocabulary's size or more leaves all tokens in.
      top_p: float32 scalar above 0; 1 leaves all tokens in.
    """

    keys: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


def filter_logits(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Divide by the temperature, keep the k best, and of those the fewest that weigh top_p.

    The three come in the order that is usual elsewhere. Tokens that tie with the k-th best stay;
    the token that passes top_p stays, so one is always left.

    Args:
      logits: (..., vocabulary).
      temperature: Scalar above 0.
      top_k: Integer scalar, at least 1.
      top_p: Scalar in (0, 1].

    Returns:
      float32 logits of the same shape, minus infinity where a token is out.

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
    # Out is whatever the tokens up to and with it weigh no more than what is to be cut off.
    weight = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    kept = (weight > 1 - top_p) | (top_p >= 1)
    kept = (kept & (ranked > -jnp.inf)).at[..., -1].set(True)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, scaled, -jnp.inf)


def draw(logits: jax.Array, choice: Choice, step: jax.Array) -> jax.Array:
    """Draw one token a row.

    Args:
      logits: (rows, vocabulary).
      choice: How.
      step: int32 scalar, how many tokens of the answer there are already.

    Returns:
      (rows,) int32. A row's token depends on its own key and logits and on the step alone.
    """
    filtered = filter_logits(logits, choice.temperature, choice.top_k, choice.top_p)

    def one(key: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, step), row)

    return jax.vmap(one)(choice.keys, filtered).astype(jnp.int32)
