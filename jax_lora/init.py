"""lora_init: the factors at the start of training, A Gaussian and B zero."""

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

from jax_lora import paths
from jax_lora.adapter import Adapter, is_adapted, is_weight
from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError, StructureError, format_error
from jax_lora.kernels.kernel import Kernel
from jax_lora.kernels.parameters import not_parameters
from jax_lora.kernels.stacks import extent, rank_mask
from jax_lora.kernels.targets import select, select_whole
from jax_lora.updates import LoraPair
from jax_lora.updates.pair import empty_pair

_ALWAYS_ALLOWED_RANK = 256  # larger ranks must be below the kernel's own size


def lora_init(
    key: jax.Array, tree: Any, config: LoraConfig, *, kernels: Mapping[str, Kernel] | None = None
) -> Adapter:
    """Make the adapter that training starts from: its update is exactly zero.

    Every pair has a key of its own, folded from the path's text, so adding a target, reordering
    a dict or another mesh changes no other pair. Runs under `jax.jit` and `jax.eval_shape`.

    Args:
      key: Random key.
      tree: Parameters of any model (arrays or `jax.ShapeDtypeStruct`s).
      config: What to adapt.
      kernels: What `find_kernels` reported for the model. Without it, two-dimensional leaves named
        `kernel` are taken as (in, out), and any other target is refused.

    Returns:
      An `Adapter` with `a` of deviation 1 / sqrt(in) and `b` zero. With `use_dora`, also the norms
      of the leaves, which are shapes alone where the leaf is a `jax.ShapeDtypeStruct`.

    Raises:
      NoMatchError: A pattern that matches no kernel.
      AmbiguousKernelError: A target whose axes are not known without `kernels`.
      ConfigError: A rank far beyond the kernel's own.
      StructureError: The tree has an adapter already.

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
    leaves = _plain_leaves(tree)
    # Without `kernels`, names alone tell what a kernel is: among parameters only.
    others = not_parameters(tree) if kernels is None else {}
    candidates = {path: leaf for path, leaf in leaves.items() if path not in others}
    selected = select(candidates, config, kernels)
    pairs = _pairs(key, selected, config)
    if config.use_dora:
        pairs = {path: _with_magnitude(leaves[path], pair) for path, pair in pairs.items()}
    whole = {path: _own_copy(leaves[path]) for path in select_whole(leaves, config)}
    return Adapter(pairs, whole, config)


def _own_copy(leaf: Any) -> Any:
    # A buffer of its own: the base and its trained copy may both be donated to a step.
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf, copy=True)


def _plain_leaves(tree: Any) -> dict[str, Any]:
    leaves = dict(paths.flatten_with_paths(tree, is_leaf=is_weight)[0])
    for path, leaf in leaves.items():
        if is_adapted(leaf):
            raise StructureError(
                format_error(
                    f"lora_init: {path}",
                    got="a leaf that has an adapter already",
                    expected="plain parameters",
                    fix="Take the adapter off first: variables, adapter = jl.partition(tree).",
                )
            )
    return {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "shape")}


def _pairs(
    key: jax.Array, kernels: Mapping[str, Kernel], config: LoraConfig
) -> dict[str, LoraPair]:
    empty = {path: _empty(kernel, config) for path, kernel in kernels.items()}
    bs = {path: jnp.zeros(pair.b.shape, config.dtype) for path, pair in empty.items()}
    # Inside a traced function every draw written out is compiled, so there they share a loop.
    traced = any(isinstance(array, Tracer) for array in (key, *bs.values()))
    draw = _draw_in_loops if traced else _draw_one_by_one
    deviations = {path: 1.0 / math.sqrt(kernel.in_size) for path, kernel in kernels.items()}
    shapes = {path: pair.a.shape for path, pair in empty.items()}
    a_of = draw(key, deviations, shapes, config.dtype)
    return {
        # a: (*stack, *in, rank), b: (*stack, rank, *out)
        path: dataclasses.replace(pair, a=_padded(a_of[path], pair), b=bs[path])
        for path, pair in empty.items()
    }


def _empty(kernel: Kernel, config: LoraConfig) -> LoraPair:
    reach = extent(kernel, config)
    _check_rank(reach.rank, kernel)
    return empty_pair(kernel, reach.rank, reach.scale, config.dtype, reach.ranks)


def _with_magnitude(base: Any, pair: LoraPair) -> LoraPair:
    if not isinstance(base, jax.ShapeDtypeStruct):
        return pair.with_magnitude(base)
    shape = jax.eval_shape(pair.with_magnitude, base).magnitude
    return dataclasses.replace(pair, magnitude=shape)


def _padded(a: jax.Array, pair: LoraPair) -> jax.Array:
    """Set to zero what lies beyond a layer's own rank: zeros in both factors never train."""
    if pair.ranks is None:
        return a
    mask = rank_mask(pair.ranks, pair.rank, len(pair.in_axes))
    return jnp.where(mask, a, jnp.zeros((), a.dtype))


# -----------------------------------------------------------------------------------------------
# Drawing: what is compiled grows with the number of shapes, not with the number of pairs
# -----------------------------------------------------------------------------------------------

_Shape = tuple[int, ...]


def _draw_one_by_one(
    key: jax.Array, deviations: Mapping[str, float], shapes: Mapping[str, _Shape], dtype: Any
) -> dict[str, jax.Array]:
    """Draw every path's Gaussian: one small program per shape, called for each path."""
    return {
        path: _draw_compiled(key, _words(path), np.float32(deviation), shapes[path], dtype)
        for path, deviation in deviations.items()
    }


def _draw_in_loops(
    key: jax.Array, deviations: Mapping[str, float], shapes: Mapping[str, _Shape], dtype: Any
) -> dict[str, jax.Array]:
    """Draw every path's Gaussian: one loop per shape over its paths."""
    drawn = {}
    for shape in dict.fromkeys(shapes.values()):
        members = [path for path in shapes if shapes[path] == shape]
        each = (
            np.stack([_words(path) for path in members]),  # (paths, 2)
            np.asarray([deviations[path] for path in members], np.float32),  # (paths,)
        )
        # A loop and not `vmap`: some generators draw other bits under `vmap`.
        rows = jax.lax.map(lambda row, shape=shape: _draw(key, row[0], row[1], shape, dtype), each)
        drawn.update(zip(members, rows, strict=True))
    return drawn


def _draw(key: jax.Array, words: Any, deviation: Any, shape: _Shape, dtype: Any) -> jax.Array:
    # As a vector: XLA takes seconds to fold the counters of a large array with more axes, and the
    # bits are the same.
    normal = jax.random.normal(_fold(key, words), (math.prod(shape),), jnp.float32)
    # The barrier keeps XLA from folding the deviation into the constants of `normal`, which would
    # give other bits in one program than in another.
    a = (jax.lax.optimization_barrier(normal) * deviation).astype(dtype)
    return a.reshape(shape)


_draw_compiled = jax.jit(_draw, static_argnums=(3, 4))


def path_key(key: jax.Array, path: str) -> jax.Array:
    """Fold a path's text into a key: the same in every process, whatever else is in the tree.

    Args:
      key: Random key.
      path: The leaf's path.

    Returns:
      A key for this path alone.
    """
    return _fold(key, _words(path))


def _words(path: str) -> np.ndarray:
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)  # (2,)


def _fold(key: jax.Array, words: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])


def _check_rank(rank: int, kernel: Kernel) -> None:
    largest = max(_ALWAYS_ALLOWED_RANK, kernel.in_size, kernel.out_size)
    if rank > largest:
        raise ConfigError(
            format_error(
                f"LoraConfig: rank of {kernel.path}",
                got=f"{rank}",
                expected=f"at most {largest}, as the kernel is {kernel.in_size} by "
                f"{kernel.out_size}",
                fix="8 to 64 is usual.",
            )
        )
