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

from jax_lora.errors import CheckpointError, ConfigError
from jax_lora.finetune.commit_mark import check_mark, step_of
from jax_lora.finetune.process_group import is_key
from jax_lora.finetune.run_folder import checkpoints_of, find_checkpoint, is_empty, is_run
from jax_lora.storage import array_store
from jax_lora.storage.atomic_writes import convert_os_errors, remove, write_file
from jax_lora.storage.json_files import is_sealed, read_json, sealed
from jax_lora.storage.safe_paths import given_path

RECORD, OPT_STATE = "training.json", "moments"  # "moments" holds any optimizer state
NOTHING = "nothing"  # a placeholder array, because some optimizers have no state
VERSION = 2
READABLE = (1, 2)  # version 1 has neither the checksum "seal" nor commit.json


def save_state(checkpoint: Path, opt_state: Any, record: dict[str, Any]) -> None:
    """Write the optimizer state, any pytree, and a record of plain values into a checkpoint.

    Raises:
      CheckpointError: Writing fails; the adapter or the model is unchanged.
    """
    folder = checkpoint / OPT_STATE
    with convert_os_errors(checkpoint, CheckpointError):
        (checkpoint / RECORD).unlink(missing_ok=True)  # first: it belongs to the earlier state
        remove(folder)
        array_store.write_arrays(folder, _numbered(opt_state))
        whole = {"version": VERSION, "files": array_store.checksums(folder), **record}
        try:
            text = json.dumps(sealed(whole), indent=1) + "\n"
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the record of {checkpoint}",
                got=str(error),
                expected="plain values that JSON can store, without NaN",
                fix="Pass only such values in Trainer(record=...).",
            ) from error
        write_file(checkpoint / RECORD, text, CheckpointError)


def find_resumable(path: str | Path) -> Path | None:
    """Find the checkpoint from which a run continues: its last one, or that of the path itself.

    Returns:
      The checkpoint; None if there is no run, or one that ended before its first checkpoint.

    Raises:
      CheckpointError: The path holds something other than a run, or a file of the checkpoint has
        changed or belongs to another checkpoint.
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
            str(checkpoint),
            got="an adapter without training state",
            expected="a checkpoint of a training run",
            fix="Start a new run, or resume from another checkpoint.",
        )
    record = read_record(checkpoint)
    check_mark(checkpoint, required=record["version"] > 1)
    # A checkpoint without a mark may have the record of another step.
    step = steps_done(record)
    if step is not None and step_of(checkpoint.name) not in (None, step):
        raise _unreadable(checkpoint, f"{RECORD} of step {step!r}")
    return checkpoint


def steps_done(record: dict[str, Any]) -> Any:
    """Return the step of a record; None if it has no progress that can be read."""
    progress = record.get("ledger")
    return progress.get("step") if isinstance(progress, dict) else None


def has_state(checkpoint: Path) -> bool:
    """Tell whether a run can be resumed from a checkpoint."""
    return (checkpoint / RECORD).is_file()


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Read the record of a checkpoint.

    Raises:
      CheckpointError: The record is missing or damaged, or a later version wrote it.
    """
    file = checkpoint / RECORD
    if not file.is_file():
        raise _unreadable(checkpoint, f"a checkpoint without {RECORD}")
    record = read_json(file, CheckpointError)
    if record.get("version") not in READABLE:
        raise _unreadable(checkpoint, f"version {record.get('version')!r} of {RECORD}")
    if record["version"] > 1 and not is_sealed(record):
        raise _unreadable(checkpoint, f"{RECORD}: contents that do not match their checksum")
    record.pop("seal", None)
    return record


def load_opt_state(checkpoint: Path, record: dict[str, Any], like: Any) -> Any:
    """Load the optimizer state, which is `like` a fresh one, after verifying its checksums.

    Raises:
      CheckpointError: The state is damaged, or belongs to another optimizer.
    """
    files, wanted = record.get("files"), _numbered(like)
    problems = [f"{RECORD} has no checksums"]
    if isinstance(files, dict) and all(isinstance(each, str) for each in files.values()):
        declared = sum(leaf.nbytes for leaf in wanted.values())
        problems = array_store.file_problems(checkpoint / OPT_STATE, files, declared)
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
            got = f"{array.dtype} {array.shape} instead of {want.dtype} {want.shape}"
            raise _unreadable(checkpoint, got)
    arrays = iter([jnp.asarray(found[name]) for name in sorted(found) if name != NOTHING])
    return jax.tree.map(
        lambda leaf: jax.random.wrap_key_data(next(arrays)) if is_key(leaf) else next(arrays), like
    )


def _numbered(opt_state: Any) -> dict[str, np.ndarray]:
    """Number the leaves."""
    leaves = [
        np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        for leaf in jax.tree.leaves(opt_state)
    ]
    return {f"{number:06d}": leaf for number, leaf in enumerate(leaves)} | {NOTHING: np.zeros(1)}


def _unreadable(checkpoint: Path, got: str) -> CheckpointError:
    return CheckpointError(
        str(checkpoint),
        got=got,
        expected="a checkpoint with the state of its run",
        fix="Resume from another checkpoint of the run, or start a new run.",
    )
