"""The fingerprint of a base model, which identifies the model at low cost.

It has the path, shape and dtype of each leaf, and a hash of a few hundred of its elements. Models
of one architecture have equal paths, shapes and dtypes, but different values.
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
# Knuth's multiplicative hashing: with 2**64 / golden ratio, k * _STEP is spread evenly over the
# range and does not coincide with the stride of rows or layers.
_STEP = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True)
class LeafFingerprint:
    """The fingerprint of one leaf."""

    shape: tuple[int, ...]
    dtype: str
    sample: str | None  # of some elements; None if they are not on the devices of this process


def fingerprint(tree: Any) -> dict[str, LeafFingerprint]:
    """Compute the `LeafFingerprint` of every leaf of a base model, by path.

    A few hundred elements of every leaf are read, shard by shard, so that the cost does not depend
    on the size of the model and no leaf is gathered. Adapters in a combined tree are ignored.

    Example:
      >>> import jax.numpy as jnp
      >>> print(fingerprint({"kernel": jnp.ones((2, 3))})["kernel"].shape)
      (2, 3)
    """
    leaves, _ = paths.flatten_with_paths(tree, is_leaf=is_weight)
    return {path: _leaf_fingerprint(base_of(leaf)) for path, leaf in leaves}


def differences(saved: Mapping[str, LeafFingerprint], tree: Any) -> dict[str, str]:
    """Compare a base model with a saved fingerprint; return the differences by path.

    For `jax.ShapeDtypeStruct`s, only paths, shapes and dtypes are compared.
    """
    have = fingerprint(tree)
    problems = {path: "not in this base model" for path in saved if path not in have}
    problems |= {path: "not in the saved base model" for path in have if path not in saved}
    for path in saved.keys() & have.keys():
        then, now = saved[path], have[path]
        if then.shape != now.shape:
            problems[path] = f"has shape {now.shape}, was saved with {then.shape}"
        elif then.dtype != now.dtype:
            problems[path] = f"has dtype {now.dtype}, was saved with {then.dtype}"
        elif then.sample and now.sample and then.sample != now.sample:
            problems[path] = "has different values"
    return dict(sorted(problems.items()))


def _leaf_fingerprint(leaf: Any) -> LeafFingerprint:
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, Recipe)):
        leaf = np.asarray(leaf)
    return LeafFingerprint(tuple(leaf.shape), str(leaf.dtype), _sample(leaf))


def _sample(leaf: Any) -> str | None:
    """Hash sampled elements; None unless all elements are in reach of this process."""
    if isinstance(leaf, Recipe):
        samples = [_sample(array) for array in jax.tree.leaves(leaf.arrays)]
        return None if None in samples else "".join(map(str, samples))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return None
    if not isinstance(leaf, jax.Array):
        values = leaf
    elif leaf.is_fully_addressable or leaf.is_fully_replicated:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        values = jax.random.key_data(leaf) if is_key else leaf
    else:
        return None
    return hashlib.blake2b(_sampled(values).tobytes(), digest_size=8).hexdigest()


def _sampled(leaf: Any) -> np.ndarray:
    """Read the elements at the sampled positions: (samples,)."""
    if leaf.size == 0:
        return np.zeros(0, leaf.dtype)
    flat = [(k * _STEP % 2**64) * leaf.size >> 64 for k in range(min(_SAMPLES, leaf.size))]
    places = np.stack(np.unravel_index(flat, leaf.shape or (1,)))  # (ndim, samples)
    if not isinstance(leaf, jax.Array):
        return leaf.reshape(leaf.shape or (1,))[tuple(places)]
    result, found = np.zeros(len(flat), leaf.dtype), np.zeros(len(flat), bool)
    for shard in leaf.addressable_shards:
        if found.all():  # the other shards are replicas
            break
        starts = np.array([each.start or 0 for each in shard.index], int)  # (ndim,)
        inside, numbers = _read(shard.data, places[: leaf.ndim] - starts[:, None])
        result[inside], found = numbers[inside], found | inside
    return result


def _read(shard: jax.Array, places: np.ndarray) -> tuple[Any, Any]:
    """Return which positions are in a shard, and the elements there (arbitrary elsewhere)."""
    sizes = np.array(shard.shape, int)[:, None]  # (ndim, 1)
    inside = np.all((places >= 0) & (places < sizes), axis=0)  # (samples,)
    return inside, np.asarray(_take(shard, np.where(inside, places, 0)))


@jax.jit
def _take(shard: jax.Array, places: jax.Array) -> jax.Array:
    if shard.ndim == 0:
        return jnp.broadcast_to(shard, places.shape[1:])
    return shard[tuple(places)]
