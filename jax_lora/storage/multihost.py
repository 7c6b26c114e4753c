"""Several processes, as `jax.distributed` starts them: what one of them does for all.

With one process everything here does the plain thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def to_host(array: Any) -> np.ndarray:
    """Copy a whole array to NumPy, wherever its parts lie.

    What is spread over several processes is gathered, for which all of them have to call this.
    """
    alone = not isinstance(array, jax.Array) or array.is_fully_addressable
    if alone or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def first_alone(do: Callable[[], None]) -> bool:
    """Let the first process do something, on a file system that all of them see, and wait for it.

    Args:
      do: What to do; what it raises is raised in the first process.

    Returns:
      Whether it was done, in every process.
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
        # Also where it failed, or the others would wait for ever.
        done = bool(multihost_utils.broadcast_one_to_all(np.int32(done)))
    return done


def orbax_options() -> Any:
    """Make Orbax act for this process alone; by itself it waits for all of them."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
