"""TrainSettings: the settings of a fine-tuning run, with validation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import optax

from jax_lora.algebra.weight_formats import METHODS
from jax_lora.config import LoraConfig
from jax_lora.data.columns import parse_columns
from jax_lora.data.prompt_template import PromptTemplate
from jax_lora.errors import ConfigError, format_error
from jax_lora.finetune.devices import AUTO, mesh_sizes
from jax_lora.finetune.optimizer_factory import check_optimizer, make_optimizer
from jax_lora.finetune.schedule import SHAPES, make_schedule
from jax_lora.models.attention_mask import ATTENTION
from jax_lora.models.rematerialization import REMAT
from jax_lora.storage import schema

TASKS = ("auto", "causal-lm", "masked-lm", "seq2seq", "classification")
TYPES = ("lora", "dora", "full")
TRUNCATIONS = ("right", "drop", "error")
TURNS = ("all", "last")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("none", *METHODS)
REMATS = ("auto", *REMAT)
LOGS = ("jsonl", "csv", "tensorboard", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of a training run.

    Args:
      task: `"causal-lm"`, `"masked-lm"`, `"seq2seq"`, `"classification"`; `"auto"`: by the
        architecture and the examples.
      labels: Names of the classes, in the order of their indices; empty: those of the examples.
      fine_tune_type: `"lora"`, `"dora"` (also the norm of each output), or `"full"` (all
        parameters; checkpoints are whole models).
      rank: Rank of every pair of factors.
      alpha: The scale is alpha / rank.
      scale: The scale, instead of alpha.
      rslora: Scale by alpha / sqrt(rank).
      dropout: Dropout rate of the adapter's inputs.
      targets: Kernels to adapt: `"all-linear"`, `"attention"`, `"mlp"`, or names and globs.
      num_layers: Number of layers to adapt, counted from the last; -1 for all.
      epochs: Passes over the training data, if `iters` is None.
      iters: Number of optimizer steps.
      batch_size: Examples in a micro-batch.
      grad_accumulation_steps: Micro-batches per optimizer step.
      max_seq_length: Maximum sequence length in tokens.
      truncate: `"right"` truncates longer examples, `"drop"` drops them, `"error"` raises an error.
      pack: Pack several examples into one sequence; none attends to another.
      mask_prompt: Exclude prompts from the loss; None: exclude them, except in plain text.
      columns: Fields and their names in the data, such as `"prompt=question,completion=answer"`.
      chat_template: Name of one of the model's chat templates, or a `.jinja` file; None: the
        default one.
      prompt_template: Format of prompts for a model without a chat template, with `{prompt}` and
        optionally `{system}`.
      turns: Assistant turns that are included in the loss: `"all"` or only the `"last"`.
      optimizer: Name of an Optax optimizer.
      learning_rate: Peak learning rate.
      lr_schedule: `"cosine"`, `"linear"` or `"constant"`.
      warmup: Fraction of the steps in which the learning rate rises.
      weight_decay: Decoupled weight decay of the trainable parameters.
      max_grad_norm: Maximum norm of the gradient; 0: no clipping.
      lora_plus_ratio: Learning rate of the factors `b` divided by that of `a` (LoRA+).
      grad_checkpoint: The same as `remat="full"`.
      remat: What layers keep for the backward pass: `"none"` (everything), `"names"` (no norms and
        activations), `"full"` (only their inputs), or `"auto"`: on a CPU everything, on an
        accelerator `"names"`, or `"full"` where that does not fit.
      attention: `"auto"` (a fused kernel where the device has one), `"dense"` or `"flash"`.
      loss_chunk: Tokens per chunk of logits; None: chosen by vocabulary size, 0: no chunks.
      steps_per_report: Steps between two reports.
      steps_per_eval: Steps between two validations.
      val_batches: Number of batches in a validation; -1 for all.
      save_every: Steps between two checkpoints.
      keep: Number of checkpoints to keep, in addition to the best one.
      save_best: Save a checkpoint at each new best validation loss.
      early_stop: Stop after this many validations without a lower loss; None: never.
      sample_prompt: Prompts that are completed at every validation.
      log: Formats of the metrics: `"jsonl"`, `"csv"`, `"tensorboard"`, `"wandb"`.
      seed: Random seed of initialization, data order, and dropout.
      mesh: Sizes of the mesh's axes, such as `"data=2,fsdp=4"`; their names are data, fsdp, tensor
        and expert. `"auto"`: the devices share the examples, and each has a copy of the model.
      dtype: Dtype of the base weights; `"auto"`: float32 on a CPU, else that of the files.
      quantize: Store the dense kernels of the base, except the output head, in fewer bits:
        `"nf4"`, `"int8"` or `"float8"`; `"none"`: as they are in the model's folder.

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
    columns: str | None = None
    chat_template: str | None = None
    prompt_template: str | None = None
    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    lr_schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_plus_ratio: float = 1.0
    grad_checkpoint: bool = False
    remat: str = "auto"
    attention: str = "auto"
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
    mesh: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"

    def __post_init__(self) -> None:
        """Check all values; `LoraConfig` checks those of the adapter."""
        self._check_counts()
        self._check_numbers()
        self._check_choices()
        self._check_texts()
        self._check_full()
        check_optimizer(self.optimizer)
        self._check("mesh", isinstance(self.mesh, str), "text")
        if self.mesh != AUTO:
            mesh_sizes(self.mesh)
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
            self._check(name, value is None or _is_count(value), "None or at least 1")
        longest, layers, chunk = self.max_seq_length, self.num_layers, self.loss_chunk
        self._check("max_seq_length", _is_count(longest) and longest > 1, "at least 2 tokens")
        self._check("num_layers", _is_count(layers) or layers == -1, "at least 1; -1 for all")
        right = chunk is None or (_is_integer(chunk) and chunk >= 0)
        self._check("loss_chunk", right, "None or at least 0")
        self._check("val_batches", _is_integer(self.val_batches), "an integer; -1 for all")
        self._check("seed", _is_integer(self.seed) and self.seed >= 0, "an integer of at least 0")

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
            ("quantize", QUANTIZE),
            ("remat", REMATS),
            ("attention", ATTENTION),
        ):
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        logs = isinstance(self.log, tuple | list) and all(each in LOGS for each in self.log)
        self._check("log", logs, f"some of {', '.join(LOGS)}")
        for name in ("rslora", "pack", "grad_checkpoint", "save_best"):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        both = self.grad_checkpoint and self.remat not in ("auto", "full")
        self._check("remat", not both, '"full", as grad_checkpoint is set')
        valid = self.mask_prompt is None or isinstance(self.mask_prompt, bool)
        self._check("mask_prompt", valid, "true, false, or None")
        names = isinstance(self.labels, tuple) and all(
            isinstance(name, str) and name for name in self.labels
        )
        right = names and len(set(self.labels)) == len(self.labels) != 1
        self._check("labels", right, "two or more different names, or none")
        texts = isinstance(self.sample_prompt, tuple) and all(
            isinstance(text, str) and text for text in self.sample_prompt
        )
        self._check("sample_prompt", texts, "texts that are not empty")

    def _check_texts(self) -> None:
        """Check the names of columns, and the templates."""
        for name in ("columns", "chat_template", "prompt_template"):
            value = getattr(self, name)
            self._check(name, value is None or (isinstance(value, str) and value), "a text")
        if self.columns is not None:
            parse_columns(self.columns)
        if self.prompt_template is not None:
            PromptTemplate(self.prompt_template)
            self._check("chat_template", self.chat_template is None, "no prompt_template beside it")

    def _check_full(self) -> None:
        """Refuse settings that have no effect without an adapter."""
        if self.fine_tune_type != "full":
            return
        for name, nothing in (("dropout", 0.0), ("lora_plus_ratio", 1.0), ("num_layers", -1)):
            right = getattr(self, name) == nothing
            self._check(name, right, f"{nothing:g} in full fine-tuning, which has no adapter")
        right = self.quantize == "none"
        self._check("quantize", right, '"none" in full fine-tuning, which changes all weights')

    def _check(self, name: str, right: Any, expected: str) -> None:
        if not right:
            raise ConfigError(
                format_error(
                    name,
                    got=repr(getattr(self, name)),
                    expected=expected,
                    fix="See the documentation of TrainSettings.",
                )
            )

    @property
    def fits_remat(self) -> bool:
        """Whether `"full"` is chosen where the step does not fit otherwise."""
        return self.remat == "auto" and not self.grad_checkpoint

    def remat_on(self, platform: str) -> str:
        """Return what layers keep for the backward pass on a platform, if it fits there."""
        if self.grad_checkpoint:
            return "full"
        if self.remat != "auto":
            return self.remat
        return "none" if platform == "cpu" else "names"

    def lora_config(self, layers: int = 0, heads: tuple[str, ...] = ()) -> LoraConfig:
        """Return the configuration of the adapter.

        Args:
          layers: The model's number of layers; required if `num_layers` is not -1.
          heads: Parts of the model that are trained in full, such as a classification head.

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
        """Return the number of steps of the run.

        Args:
          per_epoch: Batches per epoch.

        Returns:
          `iters`, or the number of steps in `epochs`.
        """
        return self.iters or max(1, round(self.epochs * per_epoch))

    def make_schedule(self, steps: int) -> optax.Schedule:
        """Create the learning rate schedule of a run with this number of steps."""
        return make_schedule(self.lr_schedule, self.learning_rate, steps, warmup=self.warmup)

    def make_optimizer(self, steps: int) -> optax.GradientTransformation:
        """Create the optimizer of a run with this number of steps."""
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
            del values["alpha"]  # alpha and scale are alternatives
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _is_integer(value: Any) -> bool:
    return schema.INTEGER.fits(value)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 1


def _is_number(value: Any) -> bool:
    return schema.is_number(value)
