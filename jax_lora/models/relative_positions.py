"""T5's positions: a bias for each head by the distance between a query and a key, in buckets.

Reference:
    Raffel et al., T5 (arXiv:1910.10683), section 2.1.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["bucket_of", "bucket_table"]


def bucket_table(buckets: int, most: int, *, both_ways: bool) -> np.ndarray:
    """The bucket of every distance that has one of its own.

    Half of the buckets hold one distance each, the others ever wider ranges up to `most`.

    Args:
      buckets: how many there are.
      most: the distance from which on all share the last bucket.
      both_ways: whether keys behind the query have buckets too, half of them; otherwise their
        distance counts as 0.

    Returns:
      (2 * most + 1,) int32, for the distances -most to most of a key from the query.

    Example:
      >>> bucket_table(4, 3, both_ways=False).tolist()
      [3, 2, 1, 0, 0, 0, 0]
    """
    distance = np.arange(-most, most + 1)
    behind = np.zeros_like(distance)
    if both_ways:
        buckets //= 2
        behind, distance = buckets * (distance > 0), np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    single = buckets // 2
    # In float32, as checkpoints were trained: a rounding decides where a bucket ends.
    ratio = np.maximum(distance, single).astype(np.float32) / np.float32(single)
    part = np.log(ratio) / np.float32(math.log(most / single))
    shared = single + (part * np.float32(buckets - single)).astype(np.int32)
    chosen = np.where(distance < single, distance, np.minimum(shared, buckets - 1))
    return (behind + chosen).astype(np.int32)


def bucket_of(table: np.ndarray, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Look up the buckets of all pairs.

    Args:
      table: from `bucket_table`.
      queries: (queries,) positions.
      keys: (keys,) positions.

    Returns:
      (queries, keys) integers.
    """
    most = len(table) // 2
    distance = keys[None, :] - queries[:, None]  # (queries, keys)
    return jnp.asarray(table)[jnp.clip(distance, -most, most) + most]
