"""The folder of a run: config.yaml, metrics.jsonl, run.json, and a checkpoint a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from jax_lora.adapter import Adapter
from jax_lora.checkpoint import save_adapter
from jax_lora.errors import CheckpointError, ConfigError, explain

CHECKPOINT = re.compile(r"step-\d{6,}")
HEADER = "# Written by jax-lora train. The same run again: jax-lora train -c THIS_FILE\n"


class RunFolder:
    """Writes what a run leaves behind.

    Args:
      path: The folder, made by `prepare`.
      keep: How many checkpoints stay, beside the best one.
    """

    def __init__(self, path: Path, *, keep: int = 3):
        """Begin without a checkpoint."""
        self.path, self._keep = path, keep
        self._saved: list[str] = []
        self.best: tuple[float, str] | None = None

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
        if _is_run(path):
            moved = _free_name(path)
            path.rename(moved)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                explain(
                    f"--adapter-path {path}",
                    got="a file, or a folder with something else in it",
                    expected="a new or empty folder, or an earlier run (which is moved aside)",
                    fix="Give another --adapter-path.",
                )
            )
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, keep=keep), moved

    def write_config(self, settings: dict[str, Any], note: str = "") -> None:
        """Write the settings such that `-c` reads them.

        Args:
          settings: Values by name.
          note: A line that says where the run came from, if not from training.
        """
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        comment = f"# {' '.join(note.split())}\n" if note else ""
        (self.path / "config.yaml").write_text(HEADER + comment + text, encoding="utf-8")

    def log(self, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def save(self, step: int, adapter: Adapter, variables: Any) -> tuple[Path, bool]:
        """Save a checkpoint, then let go of those that need not stay.

        Args:
          step: Updates made.
          adapter: The adapter after them.
          variables: The base, whose fingerprint is kept.

        Returns:
          The checkpoint's folder, and whether it is new.
        """
        name = f"step-{step:06d}"
        new = name not in self._saved
        if new:
            save_adapter(self.path / name, adapter, base=variables)
            self._saved.append(name)
            self._note()
        return self.path / name, new

    def note_validation(self, step: int, loss: float) -> bool:
        """Remember the best validation loss.

        Args:
          step: Updates made.
          loss: Validation loss after them.

        Returns:
          True if it is the best one yet, and worth a checkpoint.
        """
        if self.best is not None and not loss < self.best[0]:
            return False
        self.best = (loss, f"step-{step:06d}")
        return True

    def _note(self) -> None:
        best = self.best[1] if self.best and self.best[1] in self._saved else None
        state: dict[str, Any] = {"last": self._saved[-1], "best": best}
        if self.best and best:
            state["best_val_loss"] = self.best[0]
        part = self.path / "run.json.part"
        part.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self.path / "run.json")
        # Only now is nothing left that names the old ones.
        for name in [name for name in self._saved[: -self._keep] if name != best]:
            shutil.rmtree(self.path / name)
            self._saved.remove(name)


def find_checkpoint(path: str | Path) -> Path:
    """Find the checkpoint that a path means.

    Args:
      path: A run's folder, of which the best checkpoint by validation loss is meant (without
        validation the last one); or a checkpoint's own folder.

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: There is none.
    """
    path = Path(path)
    state = path / "run.json"
    if state.is_file():
        names = _names(state)
        for name in (names.get("best"), names.get("last")):
            # The name comes from a file, and must not lead out of the folder.
            if isinstance(name, str) and CHECKPOINT.fullmatch(name) and (path / name).is_dir():
                return path / name
    elif path.is_dir() and not _is_run(path):
        return path
    raise CheckpointError(
        explain(
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
    if not _is_run(checkpoint.parent):
        return {}
    value = yaml.safe_load(file.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _names(state: Path) -> dict[str, Any]:
    try:
        value = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_run(path: Path) -> bool:
    """Recognise a run by the first line of its settings, so that nothing else is ever moved."""
    config = path / "config.yaml"
    if not config.is_file():
        return False
    with config.open(encoding="utf-8", errors="replace") as file:
        return file.readline() == HEADER


def _free_name(path: Path) -> Path:
    number = 1
    while (moved := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return moved
