"""Resuming: a run goes on only with the settings and the data that it began with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_lora.errors import ConfigError, format_error
from jax_lora.finetune.run_folder import find_checkpoint, is_run
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.training_state import has_state

# These may change: none of them changes a number that is trained, but for the length of the run,
# which stretches the learning rate's schedule.
FREE = (
    "iters",
    "epochs",
    "steps_per_report",
    "steps_per_eval",
    "val_batches",
    "save_every",
    "keep",
    "save_best",
    "early_stop",
    "sample_prompt",
    "log",
)
LENGTH = ("iters", "epochs")


def find_resumable(path: str | Path) -> Path | None:
    """Find the checkpoint that a run goes on from.

    Args:
      path: A run's folder, of which the last checkpoint is meant, or a checkpoint's own folder.

    Returns:
      The checkpoint; None if there is no run, or one that died before its first checkpoint.

    Raises:
      CheckpointError: There is a run of an earlier version, or something else.
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
                f"--resume {checkpoint}",
                got="an adapter alone, without the state of its training",
                expected="a checkpoint that jax-lora train wrote",
                fix="Train anew without --resume, or resume from another checkpoint.",
            )
        )
    return checkpoint


def refuse_changes(
    record: Mapping[str, Any], settings: TrainSettings, data: Mapping[str, str]
) -> None:
    """Refuse to go on with a run under other settings, or on other data.

    Args:
      record: What was written beside the checkpoint.
      settings: Those of now.
      data: Digests of the splits, of now.

    Raises:
      ConfigError: They differ; the message names every difference.
    """
    then, now = record.get("settings"), settings.as_dict()
    then = then if isinstance(then, dict) else {}
    # A setting that only one of two versions has says nothing about the other.
    names = [name for name in then if name in now or name in ("alpha", "scale")]
    problems = [
        f"--{name.replace('_', '-')} was {then.get(name)!r}, now {now.get(name)!r}"
        for name in names
        if name not in FREE and then.get(name) != now.get(name)
    ]
    before = record.get("data")
    for split, digest in data.items():
        if not isinstance(before, dict) or before.get(split) != digest:
            problems.append(f"the {split} rows are other ones than when the run began")
    if problems:
        raise ConfigError(
            format_error(
                "--resume",
                got="\n    " + "\n    ".join(problems),
                expected="the settings and the rows that the run began with",
                fix="Put them back, or train anew without --resume.",
            )
        )


def stretched(record: Mapping[str, Any], settings: TrainSettings) -> bool:
    """Tell whether the run has another length now, and so another schedule."""
    then, now = record.get("settings"), settings.as_dict()
    return isinstance(then, dict) and any(then.get(name) != now[name] for name in LENGTH)
