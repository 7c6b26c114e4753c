"""Save and load the training state of a checkpoint: optimizer state and progress.

    step-000200/                 the adapter, or the model
    step-000200/training.json    progress, settings, data; checksums of the arrays
    step-000200/moments/         an Orbax checkpoint of the optimizer state

`training.json` is renamed into place last: a checkpoint that has it is complete.
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

from jax_lora.errors import CheckpointError, ConfigError, format_error
from jax_lora.finetune.run_folder import find_checkpoint, is_run
from jax_lora.storage import array_store
from jax_lora.storage.json_files import read_json

RECORD, OPT_STATE = "training.json", "moments"
NOTHING = "nothing"  # a placeholder array, because some optimizers have no state
VERSION = 1


def save_state(checkpoint: Path, opt_state: Any, record: dict[str, Any]) -> None:
    """Write the optimizer state and the record into a checkpoint's folder.

    Args:
      checkpoint: The folder.
      opt_state: The optimizer's state: any pytree of arrays.
      record: Everything else, as plain values.

    Raises:
      CheckpointError: Writing fails; the checkpoint itself is unchanged.
    """
    folder, record_file = checkpoint / OPT_STATE, checkpoint / RECORD
    try:
        shutil.rmtree(folder, ignore_errors=True)
        array_store.write_arrays(folder, _named(opt_state))
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
                fix="Free some space, then resume the run.",
            )
        ) from error


def find_resumable(path: str | Path) -> Path | None:
    """Find the checkpoint from which a run continues.

    Args:
      path: The folder of a run, whose last checkpoint is used, or a checkpoint's own folder.

    Returns:
      The checkpoint; None if there is no run, or one that ended before its first checkpoint.

    Raises:
      CheckpointError: There is a run of an earlier version, or something else.
      ConfigError: The checkpoint holds an adapter without training state.
    """
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if is_run(path) and not any(path.glob("step-*")):
        return None
    checkpoint = find_checkpoint(path, last=True)
    if not has_state(checkpoint):
        raise ConfigError(
            format_error(
                str(checkpoint),
                got="an adapter without training state",
                expected="a checkpoint of a training run",
                fix="Start a new run, or resume from another checkpoint.",
            )
        )
    return checkpoint


def remove_state(checkpoint: Path) -> None:
    """Delete the files that only resuming needs."""
    (checkpoint / RECORD).unlink(
        missing_ok=True
    )  # first, so that an incomplete state is never loaded
    shutil.rmtree(checkpoint / OPT_STATE, ignore_errors=True)


def has_state(checkpoint: Path) -> bool:
    """Tell whether a run can be resumed from a checkpoint."""
    return (checkpoint / RECORD).is_file()


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Read the record of a checkpoint.

    Args:
      checkpoint: The folder.

    Returns:
      The record.

    Raises:
      CheckpointError: The record is missing or damaged, or a later version wrote it.
    """
    file = checkpoint / RECORD
    if not file.is_file():
        raise _unreadable(checkpoint, f"a checkpoint without {RECORD}")
    record = read_json(file, CheckpointError)
    if record.get("version") != VERSION:
        raise _unreadable(checkpoint, f"version {record.get('version')!r} of {RECORD}")
    return record


def load_opt_state(checkpoint: Path, record: dict[str, Any], like: Any) -> Any:
    """Load the optimizer state, after verifying its checksums.

    Args:
      checkpoint: The folder.
      record: From `read_record`.
      like: A fresh state of the same optimizer.

    Returns:
      The state.

    Raises:
      CheckpointError: The state is damaged, or belongs to another optimizer.
    """
    files = record.get("files")
    problems = (
        array_store.file_problems(checkpoint / OPT_STATE, files)
        if isinstance(files, dict) and all(isinstance(each, str) for each in files.values())
        else [f"{RECORD} has no checksums"]
    )
    if problems:
        raise _unreadable(checkpoint, "; ".join(problems[:5]))
    wanted = _named(like)
    try:
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
        found = array_store.read_arrays(checkpoint / OPT_STATE, template)
    except Exception as error:  # Orbax raises many types
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


def _named(opt_state: Any) -> dict[str, np.ndarray]:
    """Number the leaves."""
    leaves = [_plain(leaf) for leaf in jax.tree.leaves(opt_state)]
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
            str(checkpoint),
            got=got,
            expected="a checkpoint with the state of its run",
            fix="Resume from another checkpoint of the run, or start a new run.",
        )
    )
