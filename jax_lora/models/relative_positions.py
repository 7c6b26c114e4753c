"""T5's relative positions: distances between queries and keys, in buckets.

Each head has one learned bias per bucket.

Reference:
    Raffel et al., T5 (arXiv:1910.10683), section 2.1.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def bucket_table(buckets: int, most: int, *, both_ways: bool) -> np.ndarray:
    """Compute the bucket of every distance from -most to most, from a query to a key: int32.

    Half of the buckets hold one distance each, the others logarithmically wider ranges, and the
    last all larger ones. With `both_ways`, half of the buckets are for keys after the query;
    otherwise the distance of these keys counts as 0.

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
    # In float32, as the checkpoints were trained: rounding decides where a bucket ends.
    ratio = np.maximum(distance, single).astype(np.float32) / np.float32(single)
    part = np.log(ratio) / np.float32(math.log(most / single))
    shared = single + (part * np.float32(buckets - single)).astype(np.int32)
    chosen = np.where(distance < single, distance, np.minimum(shared, buckets - 1))
    return (behind + chosen).astype(np.int32)


def bucket_of(table: np.ndarray, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Look up the buckets of all pairs of positions in a `bucket_table`: (queries, keys)."""
    most = len(table) // 2
    distance = keys[None, :] - queries[:, None]  # (queries, keys)
    return jnp.asarray(table)[jnp.clip(distance, -most, most) + most]
