"""Coordinate the processes of `jax.distributed`. A single process needs no coordination."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def to_host(array: Any) -> np.ndarray:
    """Copy a whole array to NumPy.

    An array that is sharded over several processes is gathered, so all processes must call this.
    """
    alone = not isinstance(array, jax.Array) or array.is_fully_addressable
    if alone or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def first_alone(do: Callable[[], None]) -> bool:
    """Run a function in process 0 only, while the other processes wait.

    Args:
      do: The function, which may raise an exception in process 0.

    Returns:
      Whether it succeeded, in every process.
    """
    if jax.process_count() == 1:
        do()
        return True
    from jax.experimental import multihost_utils

    done = False
    try:
        if jax.process_index() == 0:
            do()
            done = True
    finally:
        # Broadcast after a failure as well, for which the other processes wait.
        done = bool(multihost_utils.broadcast_one_to_all(np.int32(done)))
    return done


def orbax_options() -> Any:
    """Return options with which Orbax does not wait for other processes."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
