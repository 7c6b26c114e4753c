"""Inputs of a decoder: the KV cache, checks of shapes, positions and attention masks."""

from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from jax_lora.errors import ConfigError

# The arguments attention_mask, segment_ids and filled of `visible`.
MaskInputs = tuple[jax.Array | None, jax.Array | None, jax.Array | None]


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, from which a decoder continues.

    Attributes:
      keys: (layers, batch, length, key-value heads, head_dim), already rotated.
      values: Same shape.
      filled: int32 scalar, number of the `length` slots that hold a token.
    """

    keys: jax.Array
    values: jax.Array
    filled: jax.Array


def empty_cache(shape: tuple[int, ...], dtype: Any) -> KVCache:
    """Make a cache of zeros; the shape is that of `KVCache.keys`."""
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))


def check_inputs(
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
) -> None:
    """Raise for shapes that would broadcast into a wrong answer.

    Raises:
      ConfigError: If an argument's shape does not fit the others.
    """
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        _refuse("input_ids", input_ids, "integers (batch, tokens)", "add a batch axis: ids[None].")
    batch, tokens = input_ids.shape
    length = tokens if cache is None else cache.keys.shape[2]
    if cache is not None and (cache.keys.shape[1] != batch or tokens > length):
        fix = "make the cache with init_cache(batch, length) for this batch."
        _refuse("cache", cache.keys, f"room for {batch} sequences of {tokens} tokens", fix)
    if attention_mask is not None and attention_mask.shape != (batch, length):
        fix = "with a cache the mask covers its whole length, 1 where tokens will come."
        _refuse("attention_mask", attention_mask, f"shape {(batch, length)}", fix)
    for name, value in (("positions", positions), ("segment_ids", segment_ids)):
        if value is not None and value.shape != (batch, tokens):
            _refuse(name, value, f"shape {(batch, tokens)}", "give one integer per token.")
    if segment_ids is not None and cache is not None:
        fix = "generate from sequences that are not packed."
        _refuse("segment_ids", segment_ids, "None together with a cache", fix)


def _refuse(where: str, value: jax.Array, expected: str, fix: str) -> NoReturn:
    raise ConfigError(where, got=f"{value.dtype} {value.shape}", expected=expected, fix=fix)


def count_positions(
    input_ids: jax.Array, attention_mask: jax.Array | None, filled: jax.Array | None
) -> jax.Array:
    """Count, for every token, the real tokens before it; padding is not counted: (batch, tokens).

    `attention_mask` is (batch, tokens), or (batch, cache length) with a cache, of which `filled`
    slots are in use.
    """
    batch, tokens = input_ids.shape
    if attention_mask is None:
        return jnp.broadcast_to(query_slots(tokens, filled)[None], (batch, tokens))
    counted = jnp.cumsum(attention_mask.astype(jnp.int32), axis=-1) - 1
    counted = jnp.maximum(counted, 0)  # (batch, keys)
    if filled is None:
        return counted
    return jax.lax.dynamic_slice_in_dim(counted, filled, tokens, axis=1)


def query_slots(queries: int, filled: jax.Array | None) -> jax.Array:
    """Return the cache's slots of the queries, (queries,) int32; from 0 without a cache."""
    slots = jnp.arange(queries, dtype=jnp.int32)
    return slots if filled is None else slots + jnp.broadcast_to(filled, slots.shape)


def key_mask(attention_mask: jax.Array) -> jax.Array:
    """Turn a mask of keys, (batch, keys), into booleans for scores, (batch, 1, 1, keys)."""
    return attention_mask.astype(bool)[:, None, None, :]


def visible(
    queries: int,
    keys: int,
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    filled: jax.Array | None,
    window: int | None = None,
) -> jax.Array:
    """Tell which keys a query attends to: earlier, real, and of the same segment.

    `attention_mask` is (batch, keys), and `segment_ids` (batch, tokens). With a cache, there are as
    many keys as it is long, and the queries follow behind the `filled` slots. A window is the
    number of most recent keys that are visible, the query's own included.

    Returns:
      (batch or 1, 1, queries, keys) booleans.
    """
    row = query_slots(queries, filled)[:, None]
    column = jnp.arange(keys, dtype=jnp.int32)[None, :]
    seen = column <= row
    if window is not None:
        seen = seen & (column > row - jnp.int32(window))
    seen = seen[None, None]
    if attention_mask is not None:
        seen = seen & key_mask(attention_mask)
    if segment_ids is not None:
        seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return seen
