"""The fingerprint of a base model: enough to tell it from every other one, and cheap to take.

Per leaf: path, shape, type, and a hash of a few hundred of its numbers at fixed places. Two models
of one architecture share the first three and no trained leaf's numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora import paths
from jax_lora.adapter import base_of, is_weight
from jax_lora.algebra.base_weight import Recipe

_SAMPLES = 256
# Knuth's multiplicative hashing: 2**64 / golden ratio spreads k * _STEP evenly over the range and
# falls in with no stride of rows or layers.
_STEP = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True)
class LeafPrint:
    """What is remembered of one leaf of a base model.

    Args:
      shape: Its shape.
      dtype: Name of its type.
      sample: Hash of its sampled numbers; None if it had no values (`jax.ShapeDtypeStruct`) or
        lies partly on another process's devices.
    """

    shape: tuple[int, ...]
    dtype: str
    sample: str | None


def fingerprint(tree: Any) -> dict[str, LeafPrint]:
    """Take the fingerprint of a base model.

    A few hundred numbers of every leaf are read where they lie, shard by shard, so that a large
    or sharded model costs no more than a small one, and no device needs room for a whole leaf.

    Args:
      tree: Parameters, as arrays or `jax.ShapeDtypeStruct`s. Adapters in it are left out.

    Returns:
      A `LeafPrint` by path.

    Example:
      >>> import jax.numpy as jnp
      >>> print(fingerprint({"kernel": jnp.ones((2, 3))})["kernel"].shape)
      (2, 3)
    """
    leaves, _ = paths.flatten_with_paths(tree, is_leaf=is_weight)
    return {path: _leaf_print(base_of(leaf)) for path, leaf in leaves}


def differences(saved: Mapping[str, LeafPrint], tree: Any) -> dict[str, str]:
    """Compare a base model with a fingerprint taken earlier.

    Args:
      saved: The fingerprint.
      tree: The base model at hand; without values (`jax.ShapeDtypeStruct`s), only its paths,
        shapes and types are compared.

    Returns:
      What differs, by path; nothing if it is the same model.
    """
    have = fingerprint(tree)
    problems = {path: "not in this base" for path in saved if path not in have}
    problems |= {path: "was not in the base at the time" for path in have if path not in saved}
    for path in saved.keys() & have.keys():
        then, now = saved[path], have[path]
        if then.shape != now.shape:
            problems[path] = f"has shape {now.shape}, had {then.shape}"
        elif then.dtype != now.dtype:
            problems[path] = f"has type {now.dtype}, had {then.dtype}"
        elif then.sample and now.sample and then.sample != now.sample:
            problems[path] = "has other values"
    return dict(sorted(problems.items()))


def _leaf_print(leaf: Any) -> LeafPrint:
    if isinstance(leaf, Recipe):
        prints = [_leaf_print(array).sample for array in jax.tree.leaves(leaf.arrays)]
        sample = None if None in prints else "".join(map(str, prints))
        return LeafPrint(tuple(leaf.shape), str(leaf.dtype), sample)
    if isinstance(leaf, jax.ShapeDtypeStruct) or not _within_reach(leaf):
        return LeafPrint(tuple(leaf.shape), str(leaf.dtype), None)
    leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    values = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    sample = hashlib.blake2b(_sampled(values).tobytes(), digest_size=8).hexdigest()
    return LeafPrint(tuple(leaf.shape), str(leaf.dtype), sample)


def _within_reach(leaf: Any) -> bool:
    """Tell whether this process holds every number of a leaf, be it as one of many copies."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable or leaf.is_fully_replicated


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _sampled(leaf: Any) -> np.ndarray:
    """Read the numbers at the fixed places: (samples,)."""
    if leaf.size == 0:
        return np.zeros(0, leaf.dtype)
    flat = [(k * _STEP % 2**64) * leaf.size >> 64 for k in range(min(_SAMPLES, leaf.size))]
    places = np.stack(np.unravel_index(flat, leaf.shape or (1,)))  # (ndim, samples)
    if not isinstance(leaf, jax.Array):
        return leaf.reshape(leaf.shape or (1,))[tuple(places)]
    result, found = np.zeros(len(flat), leaf.dtype), np.zeros(len(flat), bool)
    for shard in leaf.addressable_shards:
        if found.all():  # the other shards are copies
            break
        starts = np.array([each.start or 0 for each in shard.index], int)  # (ndim,)
        inside, numbers = _read(shard.data, places[: leaf.ndim] - starts[:, None])
        result[inside], found = numbers[inside], found | inside
    return result


def _read(shard: jax.Array, places: np.ndarray) -> tuple[Any, Any]:
    """Tell which places lie in a shard, and read there; numbers elsewhere mean nothing."""
    sizes = np.array(shard.shape, int)[:, None]  # (ndim, 1)
    inside = np.all((places >= 0) & (places < sizes), axis=0)  # (samples,)
    return inside, np.asarray(_take(shard, np.where(inside, places, 0)))


@jax.jit
def _take(shard: jax.Array, places: jax.Array) -> jax.Array:
    if shard.ndim == 0:
        return jnp.broadcast_to(shard, places.shape[1:])
    return shard[tuple(places)]
