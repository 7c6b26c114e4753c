"""The options of `train`, for flags, help texts, and configuration files."""

from __future__ import annotations

import argparse
from typing import Any

from jax_lora.cli.base_model import BUNDLED
from jax_lora.cli.distributed import add_distributed_option
from jax_lora.cli.names import PLACES_TITLE, add_name
from jax_lora.cli.options import (
    CHAT_TEMPLATE_HELP,
    COLUMNS_HELP,
    DEFAULTS,
    PROMPT_TEMPLATE_HELP,
    add_model_option,
)
from jax_lora.cli.parser import Parser
from jax_lora.cli.presets import OF_BUNDLED, PRESETS
from jax_lora.finetune.schedule import SHAPES
from jax_lora.finetune.settings import DTYPES, QUANTIZE, REMATS, TASKS, TRUNCATIONS, TURNS, TYPES
from jax_lora.models.attention_mask import ATTENTION
from jax_lora.report.reporters import KINDS

# Group -> (name, type, metavar or choices, help text) of each flag.
GROUPS: dict[str, tuple[tuple[str, Any, Any, str], ...]] = {
    "adapter": (
        ("task", str, TASKS, "task; auto: by architecture and data"),
        ("labels", str, "NAMES", "class names, comma-separated, in order [from the data]"),
        ("fine_tune_type", str, TYPES, "LoRA, DoRA, or all parameters"),
        ("rank", int, "N", "rank of the adapter"),
        ("alpha", float, "X", "alpha; the scale of the adapter is alpha / rank"),
        ("scale", float, "X", "scale, instead of alpha [alpha / rank]"),
        ("rslora", bool, None, "scale by alpha / sqrt(rank)"),
        ("dropout", float, "P", "dropout rate of the adapter's inputs"),
        ("targets", str, "NAMES", "all-linear, attention, mlp, or comma-separated names"),
        ("num_layers", int, "N", "adapt only the last N layers; -1: all"),
        ("dtype", str, DTYPES, "dtype of the base model; auto: float32 on a CPU"),
        ("quantize", str, QUANTIZE, "store the base model's kernels in 4 or 8 bits (QLoRA)"),
    ),
    "data": (
        ("batch_size", int, "N", "examples per micro-batch"),
        ("grad_accumulation_steps", int, "N", "micro-batches per update"),
        ("max_seq_length", int, "N", "maximum tokens per example"),
        ("truncate", str, TRUNCATIONS, "treatment of longer examples"),
        ("pack", bool, None, "pack several examples into each sequence"),
        ("mask_prompt", bool, None, "exclude prompts from the loss [yes; no for texts]"),
        ("turns", str, TURNS, "assistant messages in the loss"),
        ("columns", str, "FIELD=COLUMN,...", f"{COLUMNS_HELP} [none]"),
        ("chat_template", str, "NAME|FILE", f"{CHAT_TEMPLATE_HELP} [the model's]"),
        ("prompt_template", str, "TEXT|FILE", f"{PROMPT_TEMPLATE_HELP} [none]"),
        ("seed", int, "N", "random seed: initialization, data order, dropout"),
    ),
    "optimizer": (
        ("epochs", float, "N", "passes over the training data"),
        ("iters", int, "N", "number of steps, instead of epochs [by --epochs]"),
        ("optimizer", str, "NAME", "name of an Optax optimizer"),
        ("learning_rate", float, "X", "peak learning rate"),
        ("lr_schedule", str, SHAPES, "schedule after the warmup"),
        ("warmup", float, "P", "fraction of the steps with a rising learning rate"),
        ("weight_decay", float, "X", "decoupled weight decay of trainable parameters"),
        ("max_grad_norm", float, "X", "clip the gradient to this norm; 0: no clipping"),
        ("lora_plus_ratio", float, "X", "learning rate ratio of b to a (LoRA+)"),
    ),
    "memory": (
        ("remat", str, REMATS, "what layers keep for the backward pass"),
        ("grad_checkpoint", bool, None, "same as --remat full"),
        ("attention", str, ATTENTION, "attention kernel; flash: never dense scores"),
        ("loss_chunk", int, "N", "tokens per chunk of the loss; 0: all [by memory]"),
        ("mesh", str, "SIZES", "shard over devices, as in data=2,fsdp=4,tensor=1,expert=1"),
    ),
    "validation, checkpoints and reports": (
        ("steps_per_report", int, "N", "steps between reports"),
        ("steps_per_eval", int, "N", "steps between validations"),
        ("val_batches", int, "N", "batches per validation; -1: all"),
        ("save_every", int, "N", "steps between checkpoints"),
        ("keep", int, "N", "checkpoints to keep, besides the best one"),
        ("save_best", bool, None, "save at each new best validation loss"),
        ("early_stop", int, "N", "stop after N validations without improvement [never]"),
        ("sample_prompt", str, "TEXT", "prompt to complete at every validation; repeatable [none]"),
        ("log", str, "KINDS", "jsonl, csv (always written), tensorboard, wandb; comma-separated"),
    ),
}
FLAGS = tuple(flag for group in GROUPS.values() for flag in group)


def add_options(parser: Parser) -> None:
    """Add the options, with defaults suppressed, so that a YAML file can set them."""
    absent = argparse.SUPPRESS
    add_model_option(parser, BUNDLED, default=absent)
    text = "data folder, or one file; bundled: a text-to-SQL task [required with another model]"
    add_name(parser, "--data", text, default=absent, metavar="PATH")
    text = "run folder to write [adapters]"
    add_name(parser, "--adapter-path", text, default=absent, metavar="DIR")
    add = parser.section(PLACES_TITLE).add_argument
    add("-c", "--config", metavar="FILE", help="YAML file of options; flags override it [none]")
    text = "run folder or checkpoint to resume; without a value, --adapter-path [a new run]"
    add("--resume", nargs="?", const="auto", metavar="auto|PATH", help=text)
    add("--preset", choices=tuple(PRESETS), help="use the defaults of another tool [none]")
    add_distributed_option(parser.section(PLACES_TITLE))
    add("--dry-run", action="store_true", help="check everything and compile, without training")
    add("--progress", default=absent, choices=KINDS, help="progress display [auto]")
    for title, flags in GROUPS.items():
        group = parser.section(title)
        for flag in flags:
            _add_flag(group, *flag)


def _add_flag(group: Any, name: str, kind: Any, values: Any, text: str) -> None:
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif isinstance(values, tuple):
        options |= {"type": kind, "choices": values}
    else:
        options |= {"type": kind, "metavar": values}
    if name == "sample_prompt":
        options["action"] = "append"
    options["help"] = f"{text}{_default(name)}".replace("%", "%%")
    group.add_argument("--" + name.replace("_", "-"), **options)


def _default(name: str) -> str:
    """Return the default, and that of the bundled model if it differs."""
    plain, own = DEFAULTS[name], OF_BUNDLED.get(name)
    if plain is None or plain == ():
        return ""
    shown = {True: "yes", False: "no"}.get(plain, plain) if isinstance(plain, bool) else plain
    shown = ",".join(plain) if isinstance(plain, tuple) else shown
    shown = f"{plain:g}" if isinstance(plain, float) else shown
    return f" [{shown}{f'; bundled model: {own:g}' if own is not None else ''}]"
