"""TrainSettings: every choice of a fine-tuning run, checked when made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError, explain
from jax_lora.finetune.schedule import SHAPES

TRUNCATIONS = ("right", "drop", "error")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What `train` does; the names are those of the command's flags.

    Args:
      rank: Rank of every pair of factors.
      alpha: The scale is alpha / rank.
      rslora: Scale by alpha / sqrt(rank) instead.
      dropout: Share of the adapter's inputs set to zero in training.
      targets: Which kernels: `"all-linear"`, `"attention"`, `"mlp"`, or names and globs.
      epochs: Passes over the data, if `iters` is None.
      iters: Steps.
      batch_size: Rows in a part of a batch, all of them in memory together.
      grad_accumulation_steps: Parts of a batch, one after the other.
      max_seq_length: Longest row in tokens.
      truncate: `"right"` cuts longer rows, `"drop"` leaves them out, `"error"` refuses them.
      mask_prompt: Learn answers only; None: yes, but for rows of plain text.
      learning_rate: Its peak.
      lr_schedule: `"cosine"`, `"linear"` or `"constant"`.
      warmup: Share of the steps in which the learning rate rises.
      weight_decay: Decoupled weight decay of the factors.
      max_grad_norm: Largest norm of the gradient; 0 does not clip.
      steps_per_report: Steps between two lines.
      steps_per_eval: Steps between two validations.
      val_batches: Batches of a validation; -1 for all of them.
      save_every: Steps between two checkpoints.
      keep: How many checkpoints stay, beside the best one.
      seed: Chooses the first factors, the order of the rows, and what dropout drops.
      dtype: Of the base's parameters; `"auto"` is float32 on a CPU and the files' own elsewhere.

    Raises:
      ConfigError: A value that cannot mean anything.

    Example:
      >>> TrainSettings(rank=16, alpha=32).lora_config().scale(16, 32)
      2.0
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    epochs: float = 1.0
    iters: int | None = None
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    max_seq_length: int = 2048
    truncate: str = "right"
    mask_prompt: bool | None = None
    learning_rate: float = 2e-4
    lr_schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    steps_per_report: int = 10
    steps_per_eval: int = 200
    val_batches: int = 25
    save_every: int = 200
    keep: int = 3
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check every value; the factors' settings are checked by `LoraConfig`."""
        for name in ("batch_size", "grad_accumulation_steps", "steps_per_report", "keep"):
            self._check(name, _is_count(getattr(self, name)), "an integer of at least 1")
        for name in ("steps_per_eval", "save_every"):
            self._check(name, _is_count(getattr(self, name)), "an integer of at least 1")
        self._check("iters", self.iters is None or _is_count(self.iters), "at least 1, or nothing")
        self._check("epochs", _is_number(self.epochs) and self.epochs > 0, "a number above 0")
        longest = self.max_seq_length
        self._check("max_seq_length", _is_count(longest) and longest > 1, "at least 2 tokens")
        self._check("val_batches", _is_integer(self.val_batches), "an integer; -1 for all")
        self._check("seed", _is_integer(self.seed) and self.seed >= 0, "an integer from 0 on")
        rate = self.learning_rate
        self._check("learning_rate", _is_number(rate) and rate > 0, "a number above 0")
        self._check("warmup", _is_number(self.warmup) and 0 <= self.warmup < 1, "from 0 to below 1")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            self._check(name, _is_number(value) and value >= 0, "a number from 0 on")
        for name, choices in (
            ("lr_schedule", SHAPES),
            ("truncate", TRUNCATIONS),
            ("dtype", DTYPES),
        ):
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self.lora_config()

    def _check(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise ConfigError(
                explain(
                    f"--{name.replace('_', '-')}",
                    got=repr(getattr(self, name)),
                    expected=expected,
                    fix="See jax-lora train --help.",
                )
            )

    def lora_config(self) -> LoraConfig:
        """Return the part of the settings that describes the adapter."""
        return LoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            use_rslora=self.rslora,
            dropout=self.dropout,
        )

    def iterations(self, per_epoch: int) -> int:
        """Count the steps of the run.

        Args:
          per_epoch: Batches that show every row once.

        Returns:
          `iters`, or as many as the epochs need.
        """
        return self.iters or max(1, round(self.epochs * per_epoch))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for config.yaml."""
        values = dataclasses.asdict(self)
        if isinstance(self.targets, tuple):
            values["targets"] = list(self.targets)
        return values


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
