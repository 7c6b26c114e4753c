"""The folder of a run: config.yaml, run.json, and one folder per checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax_lora.errors import CheckpointError, ConfigError
from jax_lora.finetune.commit_mark import MARK, step_of, write_mark
from jax_lora.finetune.settings import DTYPES, TASKS
from jax_lora.storage import schema
from jax_lora.storage.atomic_writes import (
    PART,
    convert_os_errors,
    made_folder,
    part_of,
    remove,
    remove_parts,
    replacing,
    write_file,
)
from jax_lora.storage.json_files import is_sealed, read_json, sealed
from jax_lora.storage.locks import LOCK, FolderLock, locked
from jax_lora.storage.safe_paths import given_path
from jax_lora.storage.yaml_files import read_yaml

CONFIG, STATE = "config.yaml", "run.json"
SEAL = "# seal: "
HEADER = "# Written by jax-lora train. The same run again: jax-lora train -c THIS_FILE\n"
# The fields of config.yaml that are used without making `TrainSettings` of all of them.
_CONFIG = schema.fields(
    {
        **dict.fromkeys(
            ("model", "data", "adapter_path", "columns", "prompt_template"),
            schema.optional(schema.TEXT),
        ),
        "task": schema.choice(*TASKS),
        "dtype": schema.choice(*DTYPES),
        "labels": schema.list_of(schema.TEXT),
        "seed": schema.integer(0, 2**63 - 1),
    }
)


class RunFolder:
    """Writes the files of a run.

    Each checkpoint is a folder that gets its name when it is complete, with a mark in it. These
    folders are the truth; run.json only lists them, and is rebuilt from them.

    Args:
      path: The folder, made by `prepare` or found by `resume`.
      saved: Names of the checkpoints that are there, oldest first.
      lock: The lock of the folder, from `claimed`; None to hold it only while writing.
    """

    def __init__(self, path: Path, *, saved: Sequence[str] = (), lock: FolderLock | None = None):
        """Begin with the checkpoints that exist."""
        self.path = path
        self._saved = list(saved)
        self._lock, self._saving = lock, threading.RLock()
        self._identity = _identity(path)

    @classmethod
    def prepare(
        cls, path: str | Path, lock: FolderLock | None = None
    ) -> tuple[RunFolder, Path | None]:
        """Make the folder; an earlier run in it is moved aside, never overwritten.

        Returns:
          The run's folder, and where an earlier run was moved to, or None.

        Raises:
          ConfigError: Something else is there already.
          CheckpointError: Another process writes to the folder, or it cannot be written.
        """
        if lock is None:
            with claimed(path) as lock:
                return cls.prepare(path, lock)
        path = Path(path)
        moved = None
        _refuse_other_files(path)
        with convert_os_errors(path, CheckpointError):
            if is_run(path):
                moved = _free_name(path)
                lock.rename_folder(moved)
                path.mkdir()
                lock.exchange(path)
        run = cls(path, lock=lock)
        run._note(None, 1)  # from now on the folder is recognized as a run
        return run, moved

    @classmethod
    def resume(
        cls, path: str | Path, *, checkpoint: str, lock: FolderLock | None = None
    ) -> tuple[RunFolder, Path | None]:
        """Resume an earlier run.

        Incomplete checkpoints are deleted, and checkpoints later than the one to resume from are
        moved aside. Every other step folder is a checkpoint, whatever run.json says of it: run.json
        is rebuilt from the folders.

        Returns:
          The run's folder, and where later checkpoints were moved to, or None.

        Raises:
          CheckpointError: Another process writes to the folder, or it cannot be written.
        """
        if lock is None:
            with claimed(path) as lock:
                return cls.resume(path, checkpoint=checkpoint, lock=lock)
        path = Path(path)
        _remove_unfinished(path)
        known = checkpoints_of(path)
        later = [name for name in known if int(name[5:]) > int(checkpoint[5:])]
        run = cls(path, saved=[name for name in known if name not in later], lock=lock)
        if not later:
            return run, None
        with convert_os_errors(path, CheckpointError):
            aside = _free_name(path / f"after-{checkpoint}")
            aside.mkdir()
            for name in later:
                (path / name).rename(aside / name)
        return run, aside

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the lock of the folder, unless it is held already.

        Raises:
          CheckpointError: Another process writes to the folder, or has replaced it since.
        """
        if self._lock is not None and self._lock.held:
            yield
            return
        with locked(self.path, CheckpointError) as self._lock:
            if _identity(self.path) != self._identity:
                raise CheckpointError(
                    str(self.path),
                    got="another folder than the one that this run began in",
                    expected="the run's own folder",
                    fix="Another run has moved it aside: resume it under its new name.",
                )
            yield

    @contextlib.contextmanager
    def emptied_on_failure(self) -> Iterator[None]:
        """Remove all files of the new run if the block fails before the first checkpoint."""
        try:
            yield
        except BaseException:
            if not self._saved:
                for each in self.path.iterdir():
                    if each.name != LOCK:
                        remove(each)
            raise

    def write_config(self, settings: dict[str, Any], note: str = "") -> None:
        """Write the settings as a YAML configuration file.

        Args:
          settings: Values by name.
          note: A line that says where the run came from, if not from training.
        """
        import yaml

        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        comment = f"# {' '.join(note.split())}\n" if note else ""
        with self._saving, self.owned():
            write_file(self.path / CONFIG, sealed_text(HEADER + comment + text), CheckpointError)

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        best: tuple[float, int] | None = None,
        *,
        keep: int = 3,
    ) -> tuple[Path, bool]:
        """Save a checkpoint, then delete those that are no longer kept.

        Args:
          step: Updates made.
          write: Writes the checkpoint into a folder, which gets its name when it is complete.
          best: The lowest validation loss so far, and its step.
          keep: How many checkpoints to keep, besides the best one.

        Returns:
          The checkpoint's folder, and whether it is new.
        """
        name = checkpoint_name(step)
        with self._saving, self.owned():
            new = name not in self._saved
            if new:
                _remove_unfinished(self.path)
                with replacing(self.path / name, CheckpointError) as part:
                    write(part)
                    write_mark(part, step)
                self._saved.append(name)
            self._note(best, keep)
        return self.path / name, new

    def has(self, step: int) -> bool:
        """Tell whether there is a checkpoint of a step."""
        return checkpoint_name(step) in self._saved

    def _note(self, best: tuple[float, int] | None, keep: int) -> None:
        chosen = checkpoint_name(best[1]) if best and self.has(best[1]) else None
        gone = [name for name in self._saved[:-keep] if name != chosen]
        self._saved = [name for name in self._saved if name not in gone]
        state: dict[str, Any] = {"last": self._saved[-1] if self._saved else None, "best": chosen}
        if best and chosen and math.isfinite(best[0]):
            state["best_val_loss"] = best[0]
        state["saved"] = self._saved
        write_file(self.path / STATE, json.dumps(sealed(state), indent=2) + "\n", CheckpointError)
        for name in gone:  # only now, when nothing names them any more
            _delete(self.path / name)


@contextlib.contextmanager
def claimed(path: str | Path) -> Iterator[FolderLock]:
    """Lock the folder of a run before anything is loaded or compiled for it.

    Args:
      path: The folder. It is created, and removed again if the block fails and leaves it empty.

    Yields:
      The lock, for `RunFolder.prepare` or `RunFolder.resume`.

    Raises:
      ConfigError: The path is a file, or a folder that holds something else than a run.
      CheckpointError: Another process writes to the folder, or it cannot be written.
    """
    folder = given_path(path, CheckpointError)
    _refuse_other_files(folder)
    with made_folder(folder, CheckpointError), locked(folder, CheckpointError) as lock:
        yield lock


def _refuse_other_files(path: Path) -> None:
    with convert_os_errors(path, CheckpointError):
        if not path.exists() or (path.is_dir() and (is_empty(path) or is_run(path))):
            return
    raise ConfigError(
        f"the run folder {path}",
        got="a file, or a folder that holds something else",
        expected="a new or empty folder, or an earlier run (which is moved aside)",
        fix="Choose another folder.",
    )


def is_empty(folder: Path) -> bool:
    """Tell whether a folder has no files but the lock of a process that was killed."""
    return all(each.name == LOCK for each in folder.iterdir())


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remove_unfinished(run: Path) -> None:
    """Remove what a killed process did not finish, in the form of this and of earlier versions."""
    remove_parts(run, "step-*", CONFIG, STATE)
    for folder in run.glob(f"step-*{PART}"):
        if step_of(folder.name.removesuffix(PART)) is not None:
            remove(folder)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint; a kill leaves no half of it under its name."""
    doomed = part_of(checkpoint)
    with contextlib.suppress(OSError):  # what cannot be deleted is still a checkpoint
        os.rename(checkpoint, doomed)
        remove(doomed)


def sealed_text(text: str) -> str:
    """Append the checksum of a text as a comment."""
    return f"{text}{SEAL}{text_digest(text)}\n"


def is_as_written(text: str) -> bool:
    """Tell whether a text has the checksum that `sealed_text` appended, or none."""
    start, found, last = text.rpartition(SEAL)
    return not found or last.strip() == text_digest(start)


def text_digest(text: str) -> str:
    """Return the checksum of a text that a run writes."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def checkpoint_name(step: int) -> str:
    """Name the checkpoint of a step."""
    return f"step-{step:06d}"


def find_checkpoint(path: str | Path, *, last: bool = False) -> Path:
    """Find the folder of the checkpoint that a path means.

    Args:
      path: A run's folder, of which the best checkpoint by validation loss is meant (without
        validation the last one); or a checkpoint's own folder.
      last: Use the last checkpoint of a run instead of the best one.

    Raises:
      CheckpointError: There is no checkpoint.
    """
    path = given_path(path, CheckpointError)
    if is_run(path):
        complete = checkpoints_of(path)
        best = None if last else _best(path, complete)
        if complete:
            return path / (best if best in complete else complete[-1])
    elif path.is_dir():
        return path
    raise CheckpointError(
        str(path),
        got="no checkpoint there" if path.exists() else "no such folder",
        expected="the folder of a run, or one of its checkpoints",
        fix="Train first, or check the path.",
    )


def read_run_config(checkpoint: Path) -> dict[str, Any]:
    """Read the settings of the run of a checkpoint; none if it is not in a run folder.

    Raises:
      CheckpointError: config.yaml is damaged.
    """
    file = checkpoint.parent / CONFIG
    if not is_run(checkpoint.parent) or not file.is_file():
        return {}
    expected = "the settings of a run, as YAML"
    fix = "Restore the file from a copy, or delete it to name model and data by options."
    values = read_yaml(file, CheckpointError, expected=expected, fix=fix)
    if problems := list(schema.problems(values, _CONFIG)):
        raise CheckpointError(str(file), got=problems, expected=expected, fix=fix)
    return values


def _names(state: Path) -> dict[str, Any]:
    try:
        return read_json(state, CheckpointError, "config_bytes")
    except CheckpointError:
        return {}


def _best(run: Path, complete: list[str]) -> Any:
    """Name the best checkpoint: by run.json, or without a sound one by the last checkpoint."""
    state = _names(run / STATE)
    # Earlier versions wrote run.json without a checksum.
    if state and ("seal" not in state or (is_sealed(state) and state.get("saved") == complete)):
        return state.get("best")
    progress = _names(run / complete[-1] / "training.json").get("ledger") if complete else None
    step = progress.get("best_step") if isinstance(progress, dict) else None
    return checkpoint_name(step) if isinstance(step, int) else None


def checkpoints_of(run: Path) -> list[str]:
    """List the checkpoints of a run by step: a folder has its name only once it is complete."""
    steps = {each.name: step_of(each.name) for each in run.glob("step-*") if each.is_dir()}
    found = {name: step for name, step in steps.items() if step is not None}
    return sorted(found, key=lambda name: found[name])


def is_run(path: Path) -> bool:
    """Recognize a run by its files, so that nothing else is ever moved."""
    if "saved" in _names(path / STATE):
        return True
    if any((path / name / MARK).is_file() for name in checkpoints_of(path)):
        return True
    config = path / CONFIG
    if not config.is_file():
        return False
    with config.open(encoding="utf-8", errors="replace") as file:
        return file.readline(len(HEADER) + 1) == HEADER


def _free_name(path: Path) -> Path:
    """Return the path, with a number behind it that no other has."""
    number = 1
    while (moved := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return moved
