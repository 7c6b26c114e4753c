"""What a decoder is called with: positions, who sees whom, and shapes that fit each other."""

from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from jax_lora.errors import ConfigError, format_error

__all__ = ["KVCache", "check_inputs", "count_positions", "visible"]


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, for a decoder to go on from.

    Attributes:
      keys: (layers, batch, length, key-value heads, head_dim), already rotated.
      values: same shape.
      filled: int32 scalar, how many of the `length` slots hold a token.
    """

    keys: jax.Array
    values: jax.Array
    filled: jax.Array


def check_inputs(
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: KVCache | None,
) -> None:
    """Refuse shapes that would broadcast into a wrong answer."""
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        _refuse("input_ids", input_ids, "integers (batch, tokens)", "add a batch axis: ids[None].")
    batch, tokens = input_ids.shape
    length = tokens if cache is None else cache.keys.shape[2]
    if cache is not None and (cache.keys.shape[1] != batch or tokens > length):
        fix = "make the cache with init_cache(batch, length) for these rows."
        _refuse("cache", cache.keys, f"room for {batch} rows of {tokens} tokens", fix)
    if attention_mask is not None and attention_mask.shape != (batch, length):
        fix = "with a cache the mask covers its whole length, 1 where tokens will come."
        _refuse("attention_mask", attention_mask, f"shape {(batch, length)}", fix)
    for name, value in (("positions", positions), ("segment_ids", segment_ids)):
        if value is not None and value.shape != (batch, tokens):
            _refuse(name, value, f"shape {(batch, tokens)}", "give one number a token.")
    if segment_ids is not None and cache is not None:
        _refuse("segment_ids", segment_ids, "none together with a cache", "generate unpacked rows.")


def _refuse(where: str, value: jax.Array, expected: str, fix: str) -> NoReturn:
    got = f"{value.dtype} {value.shape}"
    raise ConfigError(format_error(where, got=got, expected=expected, fix=fix))


def count_positions(
    input_ids: jax.Array, attention_mask: jax.Array | None, filled: jax.Array | None
) -> jax.Array:
    """Position of a token = how many real tokens stand before it; padding takes no number."""
    batch, tokens = input_ids.shape
    if attention_mask is None:
        positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None], (batch, tokens))
        return (
            positions if filled is None else positions + jnp.broadcast_to(filled, (batch, tokens))
        )
    counted = jnp.cumsum(attention_mask.astype(jnp.int32), axis=-1) - 1
    counted = jnp.maximum(counted, 0)  # (batch, keys)
    if filled is None:
        return counted
    return jax.lax.dynamic_slice_in_dim(counted, filled, tokens, axis=1)


def visible(
    queries: int,
    keys: int,
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    filled: jax.Array | None,
    window: int | None = None,
) -> jax.Array:
    """(batch or 1, 1, queries, keys) booleans: earlier, real, and of the same document.

    With a window, also no more than so many tokens back, the query's own included.
    """
    row = jnp.arange(queries, dtype=jnp.int32)[:, None]
    row = row if filled is None else row + jnp.broadcast_to(filled, row.shape)
    column = jnp.arange(keys, dtype=jnp.int32)[None, :]
    seen = column <= row
    if window is not None:
        seen = seen & (column > row - jnp.int32(window))
    seen = seen[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask.astype(bool)[:, None, None, :]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return seen
