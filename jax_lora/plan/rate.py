"""How fast this device multiplies matrices: what an estimate of time rests on."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

_SECONDS = 0.3  # of measuring
_SIZE = {"cpu": 1024}  # of the square matrices; elsewhere 4096


def matmul_rate(dtype: Any = jnp.float32) -> float:
    """Measure operations per second of a product of square matrices, for a third of a second.

    No training step is as fast as that: norms, softmax and thin products run at the memory's pace.

    Args:
      dtype: Of the matrices.

    Returns:
      Floating-point operations per second, the best of the products.
    """
    size = _SIZE.get(jax.default_backend(), 4096)
    x = jnp.ones((size, size), dtype)  # (size, size)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
