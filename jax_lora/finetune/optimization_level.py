"""Choose how far XLA optimizes the steps of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax

VARIABLE = "JAX_OPTIMIZATION_LEVEL"  # JAX's own; the user's choice is kept
OPTION = "jax_optimization_level"
DEFAULT = "UNKNOWN"  # JAX's name for the default of each compiler


def optimization_level(platform: str, devices: int) -> str:
    """Return the level for a step on a mesh.

    From O1 on, XLA for GPUs pipelines the collectives of a loop: it gathers the weights of the next
    layer while it computes this one, which needs the memory of one more layer. A step on one device
    compiles to the same program. On TPUs, collectives are asynchronous by default.

    Args:
      platform: `"cpu"`, `"cuda"`, `"rocm"` or `"tpu"`; `"gpu"` is either of the two in the middle.
      devices: Devices of the mesh.

    Returns:
      A value of JAX's option `jax_optimization_level`.

    Reference:
      https://openxla.org/xla/effort_levels

    Example:
      >>> optimization_level("gpu", 8), optimization_level("tpu", 8)
      ('O1', 'UNKNOWN')
    """
    if chosen := os.environ.get(VARIABLE):
        return chosen
    return "O1" if platform in ("gpu", "cuda", "rocm") and devices > 1 else DEFAULT


def use_optimization_level(platform: str, devices: int) -> None:
    """Compile what follows as `optimization_level` says."""
    jax.config.update(OPTION, optimization_level(platform, devices))


@contextlib.contextmanager
def at_optimization_level(platform: str, devices: int) -> Iterator[None]:
    """Compile what is inside of the context as `optimization_level` says."""
    before = getattr(jax.config, OPTION)
    use_optimization_level(platform, devices)
    try:
        yield
    finally:
        jax.config.update(OPTION, before)
