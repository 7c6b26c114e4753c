"""lora_init: the factors at the start of training, A Gaussian and B zero."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora import paths
from jax_lora.adapter import Adapter, LoraPair, empty_pair, is_adapted
from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError, StructureError, explain
from jax_lora.kernel import Kernel
from jax_lora.targets import select, select_whole

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
      An `Adapter` with `a` of deviation 1 / sqrt(in) and `b` zero.

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
    selected = select(leaves, config, kernels)
    pairs = {path: _pair(key, kernel, config) for path, kernel in selected.items()}
    whole = {path: _own_copy(leaves[path]) for path in select_whole(leaves, config)}
    return Adapter(pairs, whole, config)


def _own_copy(leaf: Any) -> Any:
    # A buffer of its own: the base and its trained copy may both be donated to a step.
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf, copy=True)


def _plain_leaves(tree: Any) -> dict[str, Any]:
    leaves = dict(paths.flatten_with_paths(tree, is_leaf=is_adapted)[0])
    for path, leaf in leaves.items():
        if is_adapted(leaf):
            raise StructureError(
                explain(
                    f"lora_init: {path}",
                    got="a leaf that has an adapter already",
                    expected="plain parameters",
                    fix="Take the adapter off first: variables, adapter = jl.partition(tree).",
                )
            )
    return {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "shape")}


def _pair(key: jax.Array, kernel: Kernel, config: LoraConfig) -> LoraPair:
    rank = config.rank_of(kernel.path)
    _check_rank(rank, kernel)
    pair = empty_pair(kernel, rank, config.scale(rank, config.alpha_of(kernel.path)), config.dtype)
    deviation = 1.0 / math.sqrt(kernel.in_size)
    normal = jax.random.normal(path_key(key, kernel.path), pair.a.shape, jnp.float32)
    # The barrier keeps XLA from folding the deviation into the constants of `normal`, which would
    # give other bits under jit than without.
    a = (jax.lax.optimization_barrier(normal) * deviation).astype(config.dtype)  # (*stack, *in, r)
    b = jnp.zeros(pair.b.shape, config.dtype)  # (*stack, rank, *out)
    return LoraPair(a, b, pair.in_axes, pair.out_axes, pair.stack_axes, pair.scale)


def path_key(key: jax.Array, path: str) -> jax.Array:
    """Fold a path's text into a key: the same in every process, whatever else is in the tree.

    Args:
      key: Random key.
      path: The leaf's path.

    Returns:
      A key for this path alone.
    """
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    for start in (0, 4):
        key = jax.random.fold_in(key, int.from_bytes(digest[start : start + 4], "little"))
    return key


def _check_rank(rank: int, kernel: Kernel) -> None:
    largest = max(_ALWAYS_ALLOWED_RANK, kernel.in_size, kernel.out_size)
    if rank > largest:
        raise ConfigError(
            explain(
                f"LoraConfig: rank of {kernel.path}",
                got=f"{rank}",
                expected=f"at most {largest}, as the kernel is {kernel.in_size} by "
                f"{kernel.out_size}",
                fix="8 to 64 is usual.",
            )
        )
