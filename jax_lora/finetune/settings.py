"""TrainSettings: every choice of a fine-tuning run, checked when made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import optax

from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError, format_error
from jax_lora.finetune.optimizer_factory import check_optimizer, make_optimizer
from jax_lora.finetune.schedule import SHAPES, make_schedule

TASKS = ("auto", "causal-lm", "masked-lm", "seq2seq", "classification")
TYPES = ("lora", "dora", "full")
TRUNCATIONS = ("right", "drop", "error")
TURNS = ("all", "last")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOGS = ("jsonl", "csv", "tensorboard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of a training run.

    Args:
      task: `"causal-lm"`, `"masked-lm"`, `"seq2seq"`, `"classification"`; `"auto"`: by the
        architecture and the examples.
      labels: Names of the classes, in the order of their indices; empty: those of the examples.
      fine_tune_type: `"lora"`, `"dora"` (LoRA that trains each output's norm too), or `"full"`
        (every parameter; the checkpoints are whole models).
      rank: Rank of every pair of factors.
      alpha: The scale is alpha / rank.
      scale: The scale itself, instead of alpha.
      rslora: Scale by alpha / sqrt(rank) instead.
      dropout: Share of the adapter's inputs set to zero in training.
      targets: Which kernels: `"all-linear"`, `"attention"`, `"mlp"`, or names and globs.
      num_layers: How many layers are adapted, counted from the top; -1 for all.
      epochs: Passes over the data, if `iters` is None.
      iters: Number of optimizer steps.
      batch_size: Examples in a micro-batch.
      grad_accumulation_steps: Micro-batches per optimizer step.
      max_seq_length: Maximum sequence length in tokens.
      truncate: `"right"` truncates longer examples, `"drop"` drops them, `"error"` raises an error.
      pack: Pack several examples into one sequence; none attends to another.
      mask_prompt: Exclude prompts from the loss; None: exclude them, except in plain text.
      turns: Assistant turns that are included in the loss: `"all"` or only the `"last"`.
      optimizer: An optimizer of Optax by its name.
      learning_rate: Peak learning rate.
      lr_schedule: `"cosine"`, `"linear"` or `"constant"`.
      warmup: Fraction of the steps in which the learning rate rises.
      weight_decay: Decoupled weight decay of the trainable parameters.
      max_grad_norm: Largest norm of the gradient; 0 does not clip.
      lora_plus_ratio: Learning rate of the factors `b` divided by that of `a` (LoRA+); 1: equal.
      grad_checkpoint: Recompute every layer in the backward pass, to save memory.
      loss_chunk: Tokens per chunk of logits; None: chosen by vocabulary size, 0: no chunks.
      steps_per_report: Steps between two reports.
      steps_per_eval: Steps between two validations.
      val_batches: Number of batches in a validation; -1 for all.
      save_every: Steps between two checkpoints.
      keep: Number of checkpoints to keep, in addition to the best one.
      save_best: Save whenever the validation loss is the lowest so far.
      early_stop: Stop after this many validations without a lower loss; None: never.
      sample_prompt: Prompts to complete at every validation.
      log: Formats of the metrics files: `"jsonl"`, `"csv"`, `"tensorboard"`.
      seed: Seed of the initial factors, the order of the examples, and dropout.
      dtype: Data type of the base weights; `"auto"`: float32 on a CPU, else that of the files.

    Raises:
      ConfigError: A value is invalid.

    Example:
      >>> TrainSettings(rank=16, alpha=32).lora_config().scale(16, 32)
      2.0
    """

    task: str = "auto"
    labels: tuple[str, ...] = ()
    fine_tune_type: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    scale: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    num_layers: int = -1
    epochs: float = 1.0
    iters: int | None = None
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    max_seq_length: int = 2048
    truncate: str = "right"
    pack: bool = False
    mask_prompt: bool | None = None
    turns: str = "all"
    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    lr_schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_plus_ratio: float = 1.0
    grad_checkpoint: bool = False
    loss_chunk: int | None = None
    steps_per_report: int = 10
    steps_per_eval: int = 200
    val_batches: int = 25
    save_every: int = 200
    keep: int = 3
    save_best: bool = True
    early_stop: int | None = None
    sample_prompt: tuple[str, ...] = ()
    log: tuple[str, ...] = ("jsonl", "csv")
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check every value; the factors' settings are checked by `LoraConfig`."""
        self._check_counts()
        self._check_numbers()
        self._check_choices()
        self._check_full()
        check_optimizer(self.optimizer)
        self.lora_config()

    def _check_counts(self) -> None:
        for name in (
            "batch_size",
            "grad_accumulation_steps",
            "steps_per_report",
            "steps_per_eval",
            "save_every",
            "keep",
        ):
            self._check(name, _is_count(getattr(self, name)), "an integer of at least 1")
        for name in ("iters", "early_stop"):
            value = getattr(self, name)
            self._check(name, value is None or _is_count(value), "at least 1, or nothing")
        longest, layers, chunk = self.max_seq_length, self.num_layers, self.loss_chunk
        self._check("max_seq_length", _is_count(longest) and longest > 1, "at least 2 tokens")
        self._check("num_layers", _is_count(layers) or layers == -1, "at least 1; -1 for all")
        right = chunk is None or (_is_integer(chunk) and chunk >= 0)
        self._check("loss_chunk", right, "an integer from 0 on, or nothing")
        self._check("val_batches", _is_integer(self.val_batches), "an integer; -1 for all")
        self._check("seed", _is_integer(self.seed) and self.seed >= 0, "an integer from 0 on")

    def _check_numbers(self) -> None:
        self._check("epochs", _is_number(self.epochs) and self.epochs > 0, "a number above 0")
        for name in ("learning_rate", "lora_plus_ratio"):
            value = getattr(self, name)
            self._check(name, _is_number(value) and value > 0, "a number above 0")
        self._check("warmup", _is_number(self.warmup) and 0 <= self.warmup < 1, "from 0 to below 1")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            self._check(name, _is_number(value) and value >= 0, "a number from 0 on")
        right = self.scale is None or (_is_number(self.scale) and self.scale > 0)
        self._check("scale", right, "a number above 0")

    def _check_choices(self) -> None:
        for name, choices in (
            ("task", TASKS),
            ("fine_tune_type", TYPES),
            ("lr_schedule", SHAPES),
            ("truncate", TRUNCATIONS),
            ("turns", TURNS),
            ("dtype", DTYPES),
        ):
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self._check("log", set(self.log) <= set(LOGS), f"some of {', '.join(LOGS)}")
        for name in ("rslora", "pack", "grad_checkpoint", "save_best"):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        known = self.mask_prompt is None or isinstance(self.mask_prompt, bool)
        self._check("mask_prompt", known, "true, false, or nothing")
        names = isinstance(self.labels, tuple) and all(
            isinstance(name, str) and name for name in self.labels
        )
        right = names and len(set(self.labels)) == len(self.labels) != 1
        self._check("labels", right, "two or more different names, or none")
        texts = isinstance(self.sample_prompt, tuple) and all(
            isinstance(text, str) and text for text in self.sample_prompt
        )
        self._check("sample_prompt", texts, "texts that are not empty")

    def _check_full(self) -> None:
        """Refuse what would silently have no effect without an adapter."""
        if self.fine_tune_type != "full":
            return
        for name, nothing in (("dropout", 0.0), ("lora_plus_ratio", 1.0), ("num_layers", -1)):
            right = getattr(self, name) == nothing
            self._check(name, right, f"{nothing:g} in full fine-tuning, without an adapter")

    def _check(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise ConfigError(
                format_error(
                    name,
                    got=repr(getattr(self, name)),
                    expected=expected,
                    fix="See the documentation of TrainSettings.",
                )
            )

    def lora_config(self, layers: int = 0, heads: tuple[str, ...] = ()) -> LoraConfig:
        """Return the part of the settings that describes the adapter.

        Args:
          layers: The model's number of layers; needed where `num_layers` omits some.
          heads: Parts of the model that are trained whole: a new classification head.

        Returns:
          The configuration.
        """
        alpha = self.alpha
        if self.scale is not None:
            alpha = self.scale * (math.sqrt(self.rank) if self.rslora else self.rank)
        first = max(0, layers - self.num_layers)
        return LoraConfig(
            rank=self.rank,
            alpha=alpha,
            targets=self.targets,
            layers=tuple(range(first, layers)) if layers and self.num_layers > 0 else None,
            use_rslora=self.rslora,
            use_dora=self.fine_tune_type == "dora",
            dropout=self.dropout,
            modules_to_save=heads,
        )

    def iterations(self, per_epoch: int) -> int:
        """Count the steps of the run.

        Args:
          per_epoch: Batches that show every row once.

        Returns:
          `iters`, or as many as the epochs need.
        """
        return self.iters or max(1, round(self.epochs * per_epoch))

    def make_schedule(self, steps: int) -> optax.Schedule:
        """Make the learning rate of a run of so many steps."""
        return make_schedule(self.lr_schedule, self.learning_rate, steps, warmup=self.warmup)

    def make_optimizer(self, steps: int) -> optax.GradientTransformation:
        """Make the optimizer of a run of so many steps."""
        return make_optimizer(
            self.make_schedule(steps),
            name=self.optimizer,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            lora_plus_ratio=self.lora_plus_ratio,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for config.yaml."""
        values = dataclasses.asdict(self)
        if self.scale is not None:
            del values["alpha"]  # which would contradict it
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
