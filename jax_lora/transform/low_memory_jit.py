"""jax.jit for functions that read 16-bit weights layer by layer.

XLA for CPU computes products of 16-bit arrays in float32. By default it moves the conversion of all
stacked layers out of the loop over the layers, so a bfloat16 model is in memory as float32 as well:
three times its size. Without that optimization, the loop converts one layer at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_lora.transform.strategies import target_platform

ONE_LAYER_AT_A_TIME = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def low_memory_jit(fun: Callable[..., Any], *, platform: str | None = None, **options: Any) -> Any:
    """Compile a function, with the memory of one layer for float32 copies of 16-bit weights.

    On other platforms than a CPU, without 16-bit arrays in the arguments, and inside another
    `jax.jit`, this is `jax.jit`.

    Args:
      fun: The function.
      platform: Target platform: "cpu", "gpu" or "tpu". None: that of the arguments.
      **options: Options of `jax.jit`.

    Returns:
      The compiled function, with the methods `lower` and `trace`.

    Example:
      >>> import jax.numpy as jnp
      >>> double = low_memory_jit(lambda x: 2 * x)
      >>> double(jnp.ones(2, jnp.bfloat16)).tolist()
      [2.0, 2.0]
    """
    return _LowMemoryJit(fun, platform, options)


class _LowMemoryJit:
    """Two compiled functions, one of which is chosen for the arguments of each call."""

    def __init__(self, fun: Callable[..., Any], platform: str | None, options: dict[str, Any]):
        functools.update_wrapper(self, fun)
        self._platform = platform
        self._plain: Any = jax.jit(fun, **options)
        self._lean: Any = jax.jit(fun, compiler_options=ONE_LAYER_AT_A_TIME, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._for(args, kwargs)(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return self._for(args, kwargs).trace(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self._for(args, kwargs).lower(*args, **kwargs)

    def _cache_size(self) -> int:
        return self._plain._cache_size() + self._lean._cache_size()

    def _for(self, args: Any, kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        lean = any(map(_is_half, leaves)) and self._on_cpu(leaves) and not _is_traced(leaves)
        return self._lean if lean else self._plain

    def _on_cpu(self, leaves: list[Any]) -> bool:
        return (self._platform or target_platform(leaves)) == "cpu"


def _is_half(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    return is_array and leaf.dtype.itemsize == 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_traced(leaves: list[Any]) -> bool:
    """Return whether the call is part of a function that is traced, which has its own options."""
    # Inside `jax.jit`, new arrays are tracers, also if no argument is.
    return any(isinstance(leaf, Tracer) for leaf in [*leaves, jnp.zeros(())])
