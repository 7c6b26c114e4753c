"""The folder of a run: config.yaml, run.json, and a checkpoint a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from jax_lora.errors import CheckpointError, ConfigError, format_error

CHECKPOINT = re.compile(r"step-\d{6,}")
PART = ".part"  # of what is not all there yet
HEADER = "# Written by jax-lora train. The same run again: jax-lora train -c THIS_FILE\n"


class RunFolder:
    """Writes what a run leaves behind.

    Args:
      path: The folder, made by `prepare` or found by `resume`.
      keep: How many checkpoints stay, beside the best one.
      saved: Names of the checkpoints that are there, oldest first.
    """

    def __init__(self, path: Path, *, keep: int = 3, saved: Sequence[str] = ()):
        """Begin with the checkpoints that are there."""
        self.path, self._keep = path, keep
        self._saved = list(saved)

    @classmethod
    def prepare(cls, path: str | Path, *, keep: int = 3) -> tuple[RunFolder, Path | None]:
        """Make the folder; an earlier run in it is moved aside, never overwritten.

        Args:
          path: Where the run goes.
          keep: How many checkpoints stay.

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
                    f"--adapter-path {path}",
                    got="a file, or a folder with something else in it",
                    expected="a new or empty folder, or an earlier run (which is moved aside)",
                    fix="Give another --adapter-path.",
                )
            )
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, keep=keep), moved

    @classmethod
    def resume(
        cls, path: str | Path, *, keep: int = 3, checkpoint: str
    ) -> tuple[RunFolder, Path | None]:
        """Take an earlier run up again.

        What a killed process left half written is removed, and checkpoints that are later than the
        one to go on from are set aside.

        Args:
          path: The run's folder.
          keep: How many checkpoints stay.
          checkpoint: Name of the one to go on from.

        Returns:
          The run's folder, and where later checkpoints were moved to, or None.
        """
        path = Path(path)
        saved = _names(path / "run.json").get("saved")
        known = [each for each in saved if _is_checkpoint(path, each)] if _is_list(saved) else []
        for folder in path.glob("step-*"):
            stale = folder.name.removesuffix(PART)
            if CHECKPOINT.fullmatch(stale) and folder.name not in known and folder.is_dir():
                shutil.rmtree(folder)
        later = [name for name in known if int(name[5:]) > int(checkpoint[5:])]
        run = cls(path, keep=keep, saved=[name for name in known if name not in later])
        if not later:
            return run, None
        aside = _free_name(path / f"after-{checkpoint}")
        aside.mkdir()
        for name in later:
            (path / name).rename(aside / name)
        return run, aside

    def write_config(self, settings: dict[str, Any], note: str = "") -> None:
        """Write the settings such that `-c` reads them.

        Args:
          settings: Values by name.
          note: A line that says where the run came from, if not from training.
        """
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        comment = f"# {' '.join(note.split())}\n" if note else ""
        (self.path / "config.yaml").write_text(HEADER + comment + text, encoding="utf-8")

    def save(
        self, step: int, write: Callable[[Path], None], best: tuple[float, int] | None = None
    ) -> tuple[Path, bool]:
        """Save a checkpoint, then let go of those that need not stay.

        Args:
          step: Updates made.
          write: Writes the checkpoint into a folder, which is given its name when all is there.
          best: The lowest validation loss so far, and its step.

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
        self._note(best)
        return self.path / name, new

    def _note(self, best: tuple[float, int] | None) -> None:
        chosen = (
            checkpoint_name(best[1]) if best and checkpoint_name(best[1]) in self._saved else None
        )
        gone = [name for name in self._saved[: -self._keep] if name != chosen]
        self._saved = [name for name in self._saved if name not in gone]
        state: dict[str, Any] = {"last": self._saved[-1], "best": chosen}
        if best and chosen:
            state["best_val_loss"] = best[0]
        state["saved"] = self._saved
        part = self.path / ("run.json" + PART)
        part.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self.path / "run.json")
        for name in gone:  # only now, when nothing names them any more
            shutil.rmtree(self.path / name)


def checkpoint_name(step: int) -> str:
    """Name the checkpoint of a step."""
    return f"step-{step:06d}"


def find_checkpoint(path: str | Path, *, last: bool = False) -> Path:
    """Find the checkpoint that a path means.

    Args:
      path: A run's folder, of which the best checkpoint by validation loss is meant (without
        validation the last one); or a checkpoint's own folder.
      last: Take a run's last checkpoint, be it the best or not.

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: There is none.
    """
    path = Path(path)
    state = path / "run.json"
    if state.is_file():
        names = _names(state)
        wanted = ("last",) if last else ("best", "last")
        for name in (names.get(each) for each in wanted):
            if _is_checkpoint(path, name):
                return path / str(name)
    elif path.is_dir() and not is_run(path):
        return path
    raise CheckpointError(
        format_error(
            f"--adapter-path {path}",
            got="no checkpoint there" if path.exists() else "no such folder",
            expected="the folder of a run, or one of its checkpoints",
            fix="Run jax-lora train first, or check the path.",
        )
    )


def read_run_config(checkpoint: Path) -> dict[str, Any]:
    """Read the settings of the run that a checkpoint came from.

    Args:
      checkpoint: A checkpoint's folder.

    Returns:
      The settings; empty if the checkpoint has been taken out of its run.
    """
    file = checkpoint.parent / "config.yaml"
    if not is_run(checkpoint.parent):
        return {}
    value = yaml.safe_load(file.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


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


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_run(path: Path) -> bool:
    """Recognise a run by the first line of its settings, so that nothing else is ever moved."""
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
