"""Resuming: a run continues only with the settings and the data that it started with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_lora.errors import ConfigError, format_error
from jax_lora.finetune.settings import TrainSettings

# These may change: none of them changes an update, except the length of the run, which stretches
# the learning rate's schedule.
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


def refuse_changes(
    record: Mapping[str, Any], settings: TrainSettings, data: Mapping[str, str]
) -> None:
    """Refuse to continue a run with other settings or other data.

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
        f"{name} was {then.get(name)!r}, now {now.get(name)!r}"
        for name in names
        if name not in FREE and then.get(name) != now.get(name)
    ]
    before = record.get("data")
    for split, digest in data.items():
        if not isinstance(before, dict) or before.get(split) != digest:
            problems.append(f"the {split} examples have changed since the run started")
    if problems:
        raise ConfigError(
            format_error(
                "resume",
                got="\n    " + "\n    ".join(problems),
                expected="the settings and the examples that the run started with",
                fix="Restore them, or start a new run.",
            )
        )


def stretched(record: Mapping[str, Any], settings: TrainSettings) -> bool:
    """Tell whether the run has another length now, and so another schedule."""
    then, now = record.get("settings"), settings.as_dict()
    return isinstance(then, dict) and any(then.get(name) != now[name] for name in LENGTH)
