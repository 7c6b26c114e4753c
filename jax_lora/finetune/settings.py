"""TrainSettings: the settings of a fine-tuning run, with validation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import optax

from jax_lora.config import LoraConfig
from jax_lora.data.columns import parse_columns
from jax_lora.data.prompt_template import PromptTemplate
from jax_lora.errors import ConfigError
from jax_lora.finetune.devices import AUTO, mesh_sizes
from jax_lora.finetune.optimizer_factory import check_optimizer, make_optimizer
from jax_lora.finetune.schedule import SHAPES, make_schedule
from jax_lora.models.attention_mask import ATTENTION
from jax_lora.models.rematerialization import REMAT
from jax_lora.quantization.weight_formats import METHODS
from jax_lora.storage.schema import BOOLEAN, INTEGER, Kind, is_number, optional

TASKS = ("auto", "causal-lm", "masked-lm", "seq2seq", "classification")
TYPES = ("lora", "dora", "full")
TRUNCATIONS = ("right", "drop", "error")
TURNS = ("all", "last")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("none", *METHODS)
REMATS = ("auto", *REMAT)
LOGS = ("jsonl", "csv", "tensorboard", "wandb")


def _is_count(value: Any) -> bool:
    return INTEGER.fits(value) and value >= 1


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, str) and each for each in value)


def _one_of(choices: tuple[str, ...]) -> Kind:
    return Kind(f"one of {', '.join(choices)}", choices.__contains__)


_COUNT = Kind("an integer of at least 1", _is_count)
_MAYBE_COUNT = Kind("None or at least 1", lambda value: value is None or _is_count(value))
_POSITIVE = Kind("a number above 0", lambda value: is_number(value) and value > 0)
_NOT_NEGATIVE = Kind("a number from 0 on", lambda value: is_number(value) and value >= 0)
_TEXT = Kind("a text", lambda value: value is None or (isinstance(value, str) and value != ""))
# What a setting may be; `LoraConfig` checks those of the adapter.
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("batch_size", "grad_accumulation_steps", "save_every", "keep"), _COUNT),
    **dict.fromkeys(("steps_per_report", "steps_per_eval"), _COUNT),
    **dict.fromkeys(("iters", "early_stop"), _MAYBE_COUNT),
    "max_seq_length": Kind("at least 2 tokens", lambda value: _is_count(value) and value > 1),
    "num_layers": Kind("at least 1; -1 for all", lambda value: _is_count(value) or value == -1),
    "loss_chunk": Kind("None or at least 0", lambda v: v is None or (INTEGER.fits(v) and v >= 0)),
    "val_batches": Kind("an integer; -1 for all", INTEGER.fits),
    "seed": Kind("an integer of at least 0", lambda value: INTEGER.fits(value) and value >= 0),
    **dict.fromkeys(("epochs", "learning_rate", "lora_plus_ratio"), _POSITIVE),
    "warmup": Kind("from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), _NOT_NEGATIVE),
    "scale": Kind("a number above 0", optional(_POSITIVE).fits),
    "task": _one_of(TASKS),
    "fine_tune_type": _one_of(TYPES),
    "lr_schedule": _one_of(SHAPES),
    "truncate": _one_of(TRUNCATIONS),
    "turns": _one_of(TURNS),
    "dtype": _one_of(DTYPES),
    "quantize": _one_of(QUANTIZE),
    "remat": _one_of(REMATS),
    "attention": _one_of(ATTENTION),
    "log": Kind(
        f"some of {', '.join(LOGS)}",
        lambda value: isinstance(value, tuple | list) and all(each in LOGS for each in value),
    ),
    **dict.fromkeys(("rslora", "pack", "grad_checkpoint", "save_best"), BOOLEAN),
    "mask_prompt": Kind("true, false, or None", optional(BOOLEAN).fits),
    "labels": Kind(
        "two or more different names, or none",
        lambda value: _are_texts(value) and len(set(value)) == len(value) != 1,
    ),
    "sample_prompt": Kind("texts that are not empty", _are_texts),
    **dict.fromkeys(("columns", "chat_template", "prompt_template"), _TEXT),
    "mesh": Kind("text", lambda value: isinstance(value, str)),
}


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
        for name, kind in _KINDS.items():
            self._check(name, kind.fits(getattr(self, name)), kind.expected)
        both = self.grad_checkpoint and self.remat not in ("auto", "full")
        self._check("remat", not both, '"full", as grad_checkpoint is set')
        if self.columns is not None:
            parse_columns(self.columns)
        if self.prompt_template is not None:
            PromptTemplate(self.prompt_template)
            self._check("chat_template", self.chat_template is None, "no prompt_template beside it")
        if self.fine_tune_type == "full":
            self._check_full()
        check_optimizer(self.optimizer)
        if self.mesh != AUTO:
            mesh_sizes(self.mesh)
        self.lora_config()

    def _check_full(self) -> None:
        """Refuse settings that have no effect without an adapter."""
        for name, nothing in (("dropout", 0.0), ("lora_plus_ratio", 1.0), ("num_layers", -1)):
            right = getattr(self, name) == nothing
            self._check(name, right, f"{nothing:g} in full fine-tuning, which has no adapter")
        right = self.quantize == "none"
        self._check("quantize", right, '"none" in full fine-tuning, which changes all weights')

    def _check(self, name: str, right: Any, expected: str) -> None:
        if not right:
            raise ConfigError(
                name,
                got=repr(getattr(self, name)),
                expected=expected,
                fix="See the documentation of TrainSettings.",
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
        """Return the number of steps of the run: `iters`, or that of `epochs`."""
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
