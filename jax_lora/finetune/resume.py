"""Resuming: a run continues only with the settings and the data that it started with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_lora.data.tokenizer_identity import identity_changes
from jax_lora.errors import ConfigError
from jax_lora.finetune.run_folder import CONFIG, is_as_written
from jax_lora.finetune.settings import TrainSettings

# These may change: none of them changes an update, except the length of the run, which stretches
# the learning rate's schedule. Another mesh only adds in another order.
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
    "chat_template",  # its text is compared, not its name
    "mesh",
)
LENGTH = ("iters", "epochs")


def refuse_changes(
    record: Mapping[str, Any],
    settings: TrainSettings,
    data: Mapping[str, str],
    text: Mapping[str, str] | None = None,
) -> None:
    """Refuse to continue a run with other settings or other data.

    Args:
      record: The contents of training.json.
      settings: Those of now.
      data: Current checksums of the splits.
      text: Current checksums of tokenizer and chat template.

    Raises:
      ConfigError: They differ; the message names every difference.
    """
    then, now = record.get("settings"), settings.as_dict()
    then = then if isinstance(then, dict) else {}
    # A setting that only one of two versions has says nothing about the other.
    names = [name for name in then if name in now or name in ("alpha", "scale")]
    problems = _changed({name: then.get(name) for name in names if name not in FREE}, now)
    before = record.get("data")
    for split, digest in data.items():
        if not isinstance(before, dict) or before.get(split) != digest:
            problems.append(f"the {split} examples have changed since the run started")
    problems += identity_changes(record.get("text"), text or {})
    if problems:
        raise ConfigError(
            "resume",
            got="\n    " + "\n    ".join(problems),
            expected="the settings and the examples that the run started with",
            fix="Restore them, or start a new run.",
        )


def refuse_edited_config(
    checkpoint: Path, config: Mapping[str, Any], record: Mapping[str, Any], *, fix: str
) -> None:
    """Refuse to continue a run whose config.yaml has other values than the run wrote.

    Args:
      checkpoint: The checkpoint to continue from.
      config: What is in config.yaml.
      record: What was written in the checkpoint.
      fix: How to continue, and how to start a new run with the edited values.

    Raises:
      ConfigError: Values were edited; the message names every one.
    """
    file = checkpoint.parent / CONFIG
    if not config or is_as_written(file.read_text(encoding="utf-8")):
        return
    parts = [record.get(name) for name in ("places", "settings")]
    then = {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}
    problems = _changed(then, config)
    problems += [f"{name} is new: {config[name]!r}" for name in config if name not in then]
    if problems:
        raise ConfigError(
            f"resume: {file}, which was edited after the run wrote it",
            got=problems,
            expected="the values of the run",
            fix=fix,
        )


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the values that are others now."""
    return [
        f"{name} was {value!r}, now {now.get(name)!r}"
        for name, value in then.items()
        if value != now.get(name)
    ]


def stretched(record: Mapping[str, Any], settings: TrainSettings) -> bool:
    """Tell whether the run has another length now, and so another schedule."""
    then, now = record.get("settings"), settings.as_dict()
    return isinstance(then, dict) and any(then.get(name) != now[name] for name in LENGTH)
