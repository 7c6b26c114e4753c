"""Coordinate the processes of `jax.distributed`. A single process needs no coordination."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jax_lora.errors import CheckpointError

MOST_BYTES = 8192  # of what process 0 tells the others; a longer error message is cut
_alone = False  # whether this process runs the function of `first_alone`


def to_host(array: Any) -> np.ndarray:
    """Copy a whole array to NumPy.

    An array that is sharded over several processes is gathered, so all processes must call this.
    """
    here = not isinstance(array, jax.Array) or array.is_fully_addressable
    if here or array.is_fully_replicated:
        return np.asarray(array)
    return _gathered(array, tiled=True)


def _gathered(array: Any, *, tiled: bool = False) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=tiled))


def first_alone(do: Callable[[], Any]) -> Any:
    """Run a function in process 0 only, while the other processes wait.

    A call inside the function waits for nobody.

    Returns:
      The function's result in every process. With several processes it must be a plain value that
      JSON can store, of at most 8 kB.

    Raises:
      CheckpointError: The function raised an exception in process 0, and this is another process.
    """
    global _alone
    if jax.process_count() == 1 or _alone:
        return do()
    told: dict[str, Any] = {"error": "interrupted"}
    try:
        if jax.process_index() == 0:
            _alone = True
            told = {"value": do()}
    except Exception as error:
        told = {"error": f"process 0: {error}"}
        raise
    finally:
        _alone = False
        # After a failure as well, for which the other processes wait.
        told = _from_first(told)
    if "error" in told:
        raise CheckpointError(told["error"])
    return told["value"]


def _from_first(value: Any) -> Any:
    """Broadcast a plain value from process 0, in an array of a fixed size."""
    from jax.experimental import multihost_utils

    text = json.dumps(value)
    if len(text) > MOST_BYTES and "error" in value:
        text = json.dumps({"error": value["error"][: MOST_BYTES // 8]})
    sent = np.frombuffer(text.encode().ljust(MOST_BYTES), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())


def gather_texts(text: str) -> list[str]:
    """Gather a text of at most 1,024 bytes from every process, in the order of the processes."""
    sent = np.frombuffer(text.encode()[:1024].ljust(1024), np.uint8)
    rows = _gathered(sent).reshape(-1, 1024)
    return [row.tobytes().decode(errors="replace").rstrip(" ") for row in rows]


def unequal(values: Mapping[str, str]) -> dict[str, list[int]]:
    """Compare texts between processes; every process must call it with the same names.

    Return, for each name whose texts differ, the processes whose text is not that of process 0.
    """
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in values.values()]
    own = np.frombuffer(b"".join(digests), np.uint32).reshape(-1, 2)
    every = _gathered(own).reshape(-1, *own.shape)
    others = (every != every[0]).any(-1)  # (processes, names)
    return {
        name: np.flatnonzero(others[:, number]).tolist()
        for number, name in enumerate(values)
        if others[:, number].any()
    }


def orbax_options() -> Any:
    """Return options with which Orbax does not wait for other processes."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
