"""Save and load the training state of a checkpoint: optimizer state and progress.

    step-000200/                 the adapter, or the model
    step-000200/training.json    progress, settings, data; checksums of the arrays
    step-000200/moments/         an Orbax checkpoint of the optimizer state
    step-000200/commit.json      the step, and checksums of the files above

`training.json` is written after the arrays: a state that has it is complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.errors import CheckpointError, ConfigError, format_error
from jax_lora.finetune.commit_mark import MARK, STEP, check_mark, write_mark
from jax_lora.finetune.run_folder import checkpoints_of, find_checkpoint, is_empty, is_run
from jax_lora.storage import array_store
from jax_lora.storage.atomic_writes import explained, remove, write_file
from jax_lora.storage.json_files import json_checksum, read_json
from jax_lora.storage.safe_paths import given_path

RECORD, OPT_STATE = "training.json", "moments"  # "moments" holds any optimizer state
NOTHING = "nothing"  # a placeholder array, because some optimizers have no state
VERSION = 2
READABLE = (1, 2)  # version 1 has no seal, and its checkpoints have no commit.json


def save_state(checkpoint: Path, opt_state: Any, record: dict[str, Any]) -> None:
    """Write the optimizer state and the record into a checkpoint's folder.

    Args:
      checkpoint: The folder.
      opt_state: The optimizer's state: any pytree of arrays.
      record: Everything else, as plain values.

    Raises:
      CheckpointError: Writing fails; the adapter or the model is unchanged.
    """
    folder = checkpoint / OPT_STATE
    with explained(checkpoint, CheckpointError):
        (checkpoint / RECORD).unlink(missing_ok=True)  # it would be of another state
        remove(folder)
        array_store.write_arrays(folder, _named(opt_state))
        whole = {"version": VERSION, "files": array_store.checksums(folder), **record}
        try:
            text = json.dumps(whole | {"seal": json_checksum(whole)}, indent=1) + "\n"
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                format_error(
                    f"the record of {checkpoint}",
                    got=str(error),
                    expected="plain values that JSON can store, without NaN",
                    fix="Pass such values as Trainer(record=...).",
                )
            ) from error
        write_file(checkpoint / RECORD, text, CheckpointError)


def find_resumable(path: str | Path) -> Path | None:
    """Find the checkpoint from which a run continues.

    Args:
      path: The folder of a run, whose last checkpoint is used, or a checkpoint's own folder.

    Returns:
      The checkpoint; None if there is no run, or one that ended before its first checkpoint.

    Raises:
      CheckpointError: There is something else than a run, or a file of the checkpoint has changed
        or is that of another checkpoint.
      ConfigError: The checkpoint holds an adapter without training state.
    """
    path = given_path(path, CheckpointError)
    if not path.exists() or (path.is_dir() and is_empty(path)):
        return None
    if is_run(path) and not checkpoints_of(path):
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
    record = read_record(checkpoint)
    check_mark(checkpoint, required=record["version"] > 1)
    _refuse_other_step(checkpoint, record)
    return checkpoint


def _refuse_other_step(checkpoint: Path, record: dict[str, Any]) -> None:
    """Refuse a record of another step, which a checkpoint without a mark may have."""
    progress, named = record.get("ledger"), STEP.fullmatch(checkpoint.name)
    step = progress.get("step") if isinstance(progress, dict) else None
    if named is not None and step is not None and step != int(named[1]):
        raise _unreadable(checkpoint, f"{RECORD} of step {step!r}")


def remove_state(checkpoint: Path) -> None:
    """Delete the files that only resuming needs."""
    with explained(checkpoint, CheckpointError):
        (checkpoint / RECORD).unlink(missing_ok=True)  # first: no incomplete state is ever loaded
        remove(checkpoint / OPT_STATE)
        if (checkpoint / MARK).is_file():
            write_mark(checkpoint, read_json(checkpoint / MARK, CheckpointError)["step"])


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
    if record.get("version") not in READABLE:
        raise _unreadable(checkpoint, f"version {record.get('version')!r} of {RECORD}")
    seal = record.pop("seal", None)
    if record["version"] > 1 and seal != json_checksum(record):
        raise _unreadable(checkpoint, f"{RECORD}: contents that do not match their checksum")
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
    files, wanted = record.get("files"), _named(like)
    declared = sum(leaf.nbytes for leaf in wanted.values())
    problems = (
        array_store.file_problems(checkpoint / OPT_STATE, files, declared)
        if isinstance(files, dict) and all(isinstance(each, str) for each in files.values())
        else [f"{RECORD} has no checksums"]
    )
    if problems:
        raise _unreadable(checkpoint, "; ".join(problems[:5]))
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
