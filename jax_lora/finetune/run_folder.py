"""The folder of a run: config.yaml, run.json, and one folder per checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax_lora.errors import CheckpointError, ConfigError, format_error

CHECKPOINT = re.compile(r"step-\d{6,}")
PART = ".part"  # suffix of incomplete checkpoints
HEADER = "# Written by jax-lora train. The same run again: jax-lora train -c THIS_FILE\n"


class RunFolder:
    """Writes the files of a run.

    Args:
      path: The folder, made by `prepare` or found by `resume`.
      saved: Names of the checkpoints that are there, oldest first.
    """

    def __init__(self, path: Path, *, saved: Sequence[str] = ()):
        """Begin with the checkpoints that exist."""
        self.path = path
        self._saved = list(saved)

    @classmethod
    def prepare(cls, path: str | Path) -> tuple[RunFolder, Path | None]:
        """Make the folder; an earlier run in it is moved aside, never overwritten.

        Args:
          path: The folder of the new run.

        Returns:
          The run's folder, and where an earlier run was moved to, or None.

        Raises:
          ConfigError: Something else is there already.
        """
        path = Path(path)
        moved = None
        if is_run(path):
            moved = _free_name(path)
            path.rename(moved)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                format_error(
                    f"the run folder {path}",
                    got="a file, or a folder that holds something else",
                    expected="a new or empty folder, or an earlier run (which is moved aside)",
                    fix="Choose another folder.",
                )
            )
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run._note(None, 1)  # from now on the folder is recognized as a run
        return run, moved

    @classmethod
    def resume(cls, path: str | Path, *, checkpoint: str) -> tuple[RunFolder, Path | None]:
        """Resume an earlier run.

        Incomplete checkpoints, whose names end in `.part`, are deleted, and checkpoints later than
        the one to resume from are moved aside. Every other step folder is a checkpoint, whatever
        run.json says of it: run.json is rebuilt from the folders.

        Args:
          path: The run's folder.
          checkpoint: Name of the checkpoint to resume from.

        Returns:
          The run's folder, and where later checkpoints were moved to, or None.
        """
        path = Path(path)
        for folder in path.glob(f"step-*{PART}"):
            if CHECKPOINT.fullmatch(folder.name.removesuffix(PART)) and folder.is_dir():
                shutil.rmtree(folder)
        known = _complete(path)
        later = [name for name in known if int(name[5:]) > int(checkpoint[5:])]
        run = cls(path, saved=[name for name in known if name not in later])
        if not later:
            return run, None
        aside = _free_name(path / f"after-{checkpoint}")
        aside.mkdir()
        for name in later:
            (path / name).rename(aside / name)
        return run, aside

    def write_config(self, settings: dict[str, Any], note: str = "") -> None:
        """Write the settings as a YAML configuration file.

        Args:
          settings: Values by name.
          note: A line that says where the run came from, if not from training.
        """
        import yaml

        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        comment = f"# {' '.join(note.split())}\n" if note else ""
        _replace(self.path / "config.yaml", HEADER + comment + text)

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
        new = name not in self._saved
        if new:
            part = self.path / (name + PART)
            shutil.rmtree(part, ignore_errors=True)
            write(part)
            part.rename(self.path / name)
            self._saved.append(name)
        self._note(best, keep)
        return self.path / name, new

    def _note(self, best: tuple[float, int] | None, keep: int) -> None:
        chosen = (
            checkpoint_name(best[1]) if best and checkpoint_name(best[1]) in self._saved else None
        )
        gone = [name for name in self._saved[:-keep] if name != chosen]
        self._saved = [name for name in self._saved if name not in gone]
        state: dict[str, Any] = {"last": self._saved[-1] if self._saved else None, "best": chosen}
        if best and chosen:
            state["best_val_loss"] = best[0]
        state["saved"] = self._saved
        _replace(self.path / "run.json", json.dumps(state, indent=2) + "\n")
        for name in gone:  # only now, when nothing names them any more
            shutil.rmtree(self.path / name)


def _replace(file: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that a kill leaves the old or the new one."""
    part = file.with_name(file.name + PART)
    part.write_text(text, encoding="utf-8")
    with part.open("r+b") as stream:
        os.fsync(stream.fileno())  # the name must not point to a file that is not on the disk yet
    os.replace(part, file)


def checkpoint_name(step: int) -> str:
    """Name the checkpoint of a step."""
    return f"step-{step:06d}"


def find_checkpoint(path: str | Path, *, last: bool = False) -> Path:
    """Find the checkpoint that a path means.

    Args:
      path: A run's folder, of which the best checkpoint by validation loss is meant (without
        validation the last one); or a checkpoint's own folder.
      last: Use the last checkpoint of a run instead of the best one.

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: There is no checkpoint.
    """
    path = Path(path)
    if is_run(path):
        best = _names(path / "run.json").get("best")
        if not last and _is_checkpoint(path, best):
            return path / str(best)
        complete = _complete(path)
        if complete:
            return path / complete[-1]
    elif path.is_dir():
        return path
    raise CheckpointError(
        format_error(
            str(path),
            got="no checkpoint there" if path.exists() else "no such folder",
            expected="the folder of a run, or one of its checkpoints",
            fix="Train first, or check the path.",
        )
    )


def read_run_config(checkpoint: Path) -> dict[str, Any]:
    """Read the settings of the run that a checkpoint came from.

    Args:
      checkpoint: A checkpoint's folder.

    Returns:
      The settings; empty if the checkpoint is not in a run folder.

    Raises:
      CheckpointError: config.yaml is damaged.
    """
    file = checkpoint.parent / "config.yaml"
    if not is_run(checkpoint.parent) or not file.is_file():
        return {}
    import yaml

    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
        problem = None if isinstance(value, dict) else f"a {type(value).__name__}"
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        value, problem = {}, " ".join(str(error).split())[:200]
    if problem is not None:
        raise CheckpointError(
            format_error(
                str(file),
                got=problem,
                expected="the settings of a run, as YAML",
                fix="Restore the file from a copy, or delete it to name model and data by options.",
            )
        )
    return value


def _names(state: Path) -> dict[str, Any]:
    try:
        value = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_checkpoint(run: Path, name: Any) -> bool:
    """Tell whether a name from a file is that of a checkpoint; it must not lead out of the run."""
    known = isinstance(name, str) and CHECKPOINT.fullmatch(name) is not None
    return known and (run / name).is_dir()


def _complete(run: Path) -> list[str]:
    """List the checkpoints of a run by step: a folder has its name only once it is complete."""
    names = [each.name for each in run.glob("step-*") if _is_checkpoint(run, each.name)]
    return sorted(names, key=lambda name: int(name[5:]))


def is_run(path: Path) -> bool:
    """Recognize a run by its files, so that nothing else is ever moved."""
    if "saved" in _names(path / "run.json"):
        return True
    config = path / "config.yaml"
    if not config.is_file():
        return False
    with config.open(encoding="utf-8", errors="replace") as file:
        return file.readline() == HEADER


def _free_name(path: Path) -> Path:
    """Return the path, with a number behind it that no other has."""
    number = 1
    while (moved := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return moved
