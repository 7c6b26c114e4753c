"""What resuming needs beside the checkpoint itself: the optimizer's moments, and the ledger.

    step-000200/                 the adapter, or the model
    step-000200/training.json    ledger, settings, data; checksums of the arrays
    step-000200/moments/         an Orbax checkpoint of the optimizer's state

`training.json` is put in place last, in one step: where it is, all is.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.errors import CheckpointError, format_error
from jax_lora.storage import array_store
from jax_lora.storage.json_files import read_json

RECORD, MOMENTS = "training.json", "moments"
NOTHING = "nothing"  # an array that is always there, as some optimizers have no state
VERSION = 1


def save_state(checkpoint: Path, moments: Any, record: dict[str, Any]) -> None:
    """Write the moments and the record into a checkpoint's folder.

    Args:
      checkpoint: The folder.
      moments: The optimizer's state: any pytree of arrays.
      record: All else, as plain values.

    Raises:
      CheckpointError: The file system refuses; the checkpoint itself is untouched.
    """
    folder, record_file = checkpoint / MOMENTS, checkpoint / RECORD
    try:
        shutil.rmtree(folder, ignore_errors=True)
        array_store.write_arrays(folder, _named(moments))
        whole = {"version": VERSION, "files": array_store.checksums(folder), **record}
        part = checkpoint / f"{RECORD}.part"
        part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(part, record_file)
    except OSError as error:
        raise CheckpointError(
            format_error(
                str(checkpoint),
                got=f"{type(error).__name__}: {error}",
                expected="a folder that can be written to, on a file system with room",
                fix="Free some space, then go on with --resume.",
            )
        ) from error


def remove_state(checkpoint: Path) -> None:
    """Take away what only resuming needs."""
    (checkpoint / RECORD).unlink(missing_ok=True)  # first, so that no half is ever believed
    shutil.rmtree(checkpoint / MOMENTS, ignore_errors=True)


def has_state(checkpoint: Path) -> bool:
    """Tell whether a run can be resumed from a checkpoint."""
    return (checkpoint / RECORD).is_file()


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Read what was written down beside the arrays.

    Args:
      checkpoint: The folder.

    Returns:
      The record.

    Raises:
      CheckpointError: There is none, it is damaged, or a later version wrote it.
    """
    file = checkpoint / RECORD
    if not file.is_file():
        raise _unreadable(checkpoint, f"a checkpoint without {RECORD}")
    record = read_json(file, CheckpointError)
    if record.get("version") != VERSION:
        raise _unreadable(checkpoint, f"version {record.get('version')!r} of {RECORD}")
    return record


def load_moments(checkpoint: Path, record: dict[str, Any], like: Any) -> Any:
    """Read the optimizer's state, after checking every byte of it.

    Args:
      checkpoint: The folder.
      record: From `read_record`.
      like: A fresh state of the same optimizer.

    Returns:
      The state.

    Raises:
      CheckpointError: It is damaged, or the state of another optimizer.
    """
    files = record.get("files")
    problems = (
        array_store.file_problems(checkpoint / MOMENTS, files)
        if isinstance(files, dict) and all(isinstance(each, str) for each in files.values())
        else [f"{RECORD} has no checksums"]
    )
    if problems:
        raise _unreadable(checkpoint, "; ".join(problems[:5]))
    wanted = _named(like)
    try:
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
        found = array_store.read_arrays(checkpoint / MOMENTS, template)
    except Exception as error:  # whatever Orbax meets
        raise _unreadable(checkpoint, f"{type(error).__name__}: {str(error)[:200]}") from error
    for name, array in found.items():
        want = wanted[name]
        if (array.shape, array.dtype) != (want.shape, want.dtype):
            got = f"{array.dtype} {array.shape} where {want.dtype} {want.shape} belongs"
            raise _unreadable(checkpoint, got)
    leaves, treedef = jax.tree.flatten(like)
    arrays = [found[name] for name in sorted(found) if name != NOTHING]
    again = [_as(leaf, array) for leaf, array in zip(leaves, arrays, strict=True)]
    return jax.tree.unflatten(treedef, again)


def _named(moments: Any) -> dict[str, np.ndarray]:
    """Number the leaves."""
    leaves = [_plain(leaf) for leaf in jax.tree.leaves(moments)]
    return {f"{number:06d}": leaf for number, leaf in enumerate(leaves)} | {NOTHING: np.zeros(1)}


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _as(like: Any, array: np.ndarray) -> Any:
    return jax.random.wrap_key_data(jnp.asarray(array)) if _is_key(like) else jnp.asarray(array)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(bool)), jax.dtypes.prng_key)


def _unreadable(checkpoint: Path, got: str) -> CheckpointError:
    return CheckpointError(
        format_error(
            f"--resume {checkpoint}",
            got=got,
            expected="a checkpoint with the state of its run",
            fix="Resume from another checkpoint of the run, or train anew without --resume.",
        )
    )
