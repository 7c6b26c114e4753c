"""lora_init: create an adapter whose update is zero, with A Gaussian and B zero."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_lora.adapter import Adapter, plain_leaves
from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError
from jax_lora.kernels.kernel import Kernel
from jax_lora.kernels.stacks import rank_mask, ranks_and_scales
from jax_lora.kernels.targets import select, select_whole
from jax_lora.transform.parameters import not_parameters
from jax_lora.updates import LoraPair
from jax_lora.updates.pair import empty_pair

_ALWAYS_ALLOWED_RANK = 256  # a larger rank must not exceed both sides of the kernel


def lora_init(
    key: jax.Array, tree: Any, config: LoraConfig, *, kernels: Mapping[str, Kernel] | None = None
) -> Adapter:
    """Create an adapter for the parameters of a model. Its initial update is exactly zero.

    The random key of a pair is derived from its path. Adding a target, reordering a dict or
    changing the mesh does not change the other pairs. Works under `jax.jit` and `jax.eval_shape`.

    Args:
      key: Random key.
      tree: Parameters of any model (arrays or `jax.ShapeDtypeStruct`s).
      config: The configuration.
      kernels: The result of `find_kernels` for the model. Without it, two-dimensional leaves named
        `kernel` have the axes (in, out), and other targets raise an error.

    Returns:
      An `Adapter` with `a` of standard deviation 1 / sqrt(in) and `b` zero. With `use_dora`, the
      magnitudes are the norms of the kernels (`jax.ShapeDtypeStruct`s if the kernel is one).

    Raises:
      NoMatchError: A pattern matches no kernel.
      AmbiguousKernelError: The axes of a target are not known without `kernels`.
      ConfigError: A rank exceeds the size of its kernel, or a kernel has no elements.
      StructureError: The tree already has an adapter.

    Warns:
      SkippedKernelWarning: A target is in `kernels.skipped`.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), section 4.1: A Gaussian, B zero.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"q_proj": {"kernel": jnp.ones((4096, 4096))}}
      >>> adapter = jax.eval_shape(
      ...     lambda key: lora_init(key, params, LoraConfig(rank=8)), jax.random.key(0))
      >>> adapter.size
      65536
    """
    leaves = {p: leaf for p, leaf in plain_leaves("lora_init", tree) if hasattr(leaf, "shape")}
    # Without `kernels`, a kernel is recognized by its name, which may also occur in other state.
    others = not_parameters(tree) if kernels is None else {}
    candidates = {path: leaf for path, leaf in leaves.items() if path not in others}
    selected = select(candidates, config, kernels)
    pairs = _pairs(key, selected, config)
    if config.use_dora:
        pairs = {path: _with_magnitude(leaves[path], pair) for path, pair in pairs.items()}
    whole = {path: _own_copy(leaves[path]) for path in select_whole(leaves, config)}
    return Adapter(pairs, whole, config)


def _own_copy(leaf: Any) -> Any:
    # A separate buffer: the base leaf and its trained copy may both be donated to a step.
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf, copy=True)


def _pairs(
    key: jax.Array, kernels: Mapping[str, Kernel], config: LoraConfig
) -> dict[str, LoraPair]:
    empty = {}
    for path, kernel in kernels.items():
        reach = ranks_and_scales(kernel, config)
        _check_rank(reach.rank, kernel)
        empty[path] = empty_pair(kernel, reach.rank, reach.scale, config.dtype, reach.ranks)
    bs = {path: jnp.zeros(pair.b.shape, config.dtype) for path, pair in empty.items()}
    # Inside a traced function every draw adds to the compile time, so draws share a loop there.
    traced = any(isinstance(array, Tracer) for array in (key, *bs.values()))
    draw = _draw_in_loops if traced else _draw_one_by_one
    deviations = {path: 1.0 / math.sqrt(kernel.in_size) for path, kernel in kernels.items()}
    a_of = draw(key, deviations, {path: pair.a.shape for path, pair in empty.items()}, config.dtype)
    return {
        # a: (*stack, *in, rank), b: (*stack, rank, *out)
        path: dataclasses.replace(pair, a=_padded(a_of[path], pair), b=bs[path])
        for path, pair in empty.items()
    }


def _with_magnitude(base: Any, pair: LoraPair) -> LoraPair:
    if not isinstance(base, jax.ShapeDtypeStruct):
        return pair.with_magnitude(base)
    shape = jax.eval_shape(pair.with_magnitude, base).magnitude
    return dataclasses.replace(pair, magnitude=shape)


def _padded(a: jax.Array, pair: LoraPair) -> jax.Array:
    """Set the padding beyond each layer's rank to zero; with `b` zero too, it stays zero."""
    if pair.ranks is None:
        return a
    mask = rank_mask(pair.ranks, pair.rank, len(pair.in_axes))
    return jnp.where(mask, a, jnp.zeros((), a.dtype))


# -----------------------------------------------------------------------------------------------
# Sampling: compile time grows with the number of shapes, not with the number of pairs
# -----------------------------------------------------------------------------------------------

_Shape = tuple[int, ...]


def _draw_one_by_one(
    key: jax.Array, deviations: Mapping[str, float], shapes: Mapping[str, _Shape], dtype: Any
) -> dict[str, jax.Array]:
    """Sample every path with a function that is compiled once per shape."""
    # The key of a path is computed by a function of its own, compiled once for all shapes.
    return {
        path: _draw_compiled(
            _fold_compiled(key, _words(path)), np.float32(deviation), shapes[path], dtype
        )
        for path, deviation in deviations.items()
    }


def _draw_in_loops(
    key: jax.Array, deviations: Mapping[str, float], shapes: Mapping[str, _Shape], dtype: Any
) -> dict[str, jax.Array]:
    """Sample the paths of each shape in a loop."""
    drawn = {}
    for shape in dict.fromkeys(shapes.values()):
        members = [path for path in shapes if shapes[path] == shape]
        each = (
            np.stack([_words(path) for path in members]),  # (paths, 2)
            np.asarray([deviations[path] for path in members], np.float32),  # (paths,)
        )
        # Not `vmap`: some random number generators produce different bits under `vmap`.
        rows = jax.lax.map(
            lambda row, shape=shape: _draw(_fold(key, row[0]), row[1], shape, dtype), each
        )
        drawn.update(zip(members, rows, strict=True))
    return drawn


def _draw(key: jax.Array, deviation: Any, shape: _Shape, dtype: Any) -> jax.Array:
    # Sample a vector: with more axes XLA spends seconds on folding the counters of a large array,
    # and the bits are the same.
    normal = jax.random.normal(key, (math.prod(shape),), jnp.float32)
    # Without the barrier, XLA folds the deviation into the constants of `normal`, and the bits
    # depend on the surrounding function.
    a = (jax.lax.optimization_barrier(normal) * deviation).astype(dtype)
    return a.reshape(shape)


_draw_compiled = jax.jit(_draw, static_argnums=(2, 3))


def path_key(key: jax.Array, path: str) -> jax.Array:
    """Derive a random key from a path. It is the same in every process and for every tree."""
    return _fold(key, _words(path))


def _words(path: str) -> np.ndarray:
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)  # (2,)


def _fold(key: jax.Array, words: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])


_fold_compiled = jax.jit(_fold)


def _check_rank(rank: int, kernel: Kernel) -> None:
    if 0 in kernel.shape:
        raise ConfigError(
            f"LoraConfig: target {kernel.path}",
            got=f"a kernel of shape {kernel.shape}, which has no elements",
            expected="kernels with elements",
            fix="Exclude it by choosing other targets.",
        )
    largest = max(_ALWAYS_ALLOWED_RANK, kernel.in_size, kernel.out_size)
    if rank > largest:
        raise ConfigError(
            f"LoraConfig: rank of {kernel.path}",
            got=f"{rank}",
            expected=f"at most {largest} for a kernel of {kernel.in_size} by {kernel.out_size}",
            fix="Typical ranks are 8 to 64.",
        )
