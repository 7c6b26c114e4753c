"""The options of `train`: one table, from which flags, help and configuration files are made."""

from __future__ import annotations

import argparse
from typing import Any

from jax_lora.cli.options import DEFAULTS
from jax_lora.cli.presets import PRESETS
from jax_lora.finetune import recipe
from jax_lora.finetune.schedule import SHAPES
from jax_lora.finetune.settings import DTYPES, TRUNCATIONS, TURNS, TYPES
from jax_lora.report.reporters import KINDS

# Flag, type, metavar or choices, and what it says in --help; by what the flags are about.
GROUPS: dict[str, tuple[tuple[str, Any, Any, str], ...]] = {
    "what is trained": (
        ("fine_tune_type", str, TYPES, "LoRA, LoRA with trained norms, or every parameter"),
        ("rank", int, "N", "rank of the factors"),
        ("alpha", float, "X", "the adapter's scale is alpha / rank"),
        ("scale", float, "X", "the scale itself, instead of alpha"),
        ("rslora", bool, None, "scale by alpha / sqrt(rank)"),
        ("dropout", float, "P", "share of the adapter's inputs dropped in training"),
        ("targets", str, "NAMES", "all-linear, attention, mlp, or names and globs with commas"),
        ("num_layers", int, "N", "adapt the last N layers; -1 for all"),
        ("dtype", str, DTYPES, "of the base; auto: float32 on a CPU"),
    ),
    "data": (
        ("batch_size", int, "N", "rows in memory together"),
        ("grad_accumulation_steps", int, "N", "batches to an update"),
        ("max_seq_length", int, "N", "longest row in tokens"),
        ("truncate", str, TRUNCATIONS, "what becomes of longer rows"),
        ("pack", bool, None, "put several rows into one; none sees another"),
        ("mask_prompt", bool, None, "learn answers only (yes; no for rows of text)"),
        ("turns", str, TURNS, "which of a chat's answers are learned"),
        ("seed", int, "N", "chooses factors, order and dropout"),
    ),
    "optimizer": (
        ("epochs", float, "N", "passes over the data"),
        ("iters", int, "N", "steps, instead of epochs"),
        ("optimizer", str, "NAME", "an optimizer of Optax"),
        ("learning_rate", float, "X", "its peak"),
        ("lr_schedule", str, SHAPES, "shape after the warm-up"),
        ("warmup", float, "P", "share of the steps in which the learning rate rises"),
        ("weight_decay", float, "X", "weight decay of what is trained"),
        ("max_grad_norm", float, "X", "clip the gradient's norm; 0 does not"),
        ("lora_plus_ratio", float, "X", "learning rate of b over that of a (LoRA+)"),
    ),
    "memory": (
        ("grad_checkpoint", bool, None, "recompute layers in the backward pass"),
        ("loss_chunk", int, "N", "tokens whose logits are in memory together; 0 for all"),
    ),
    "validation, checkpoints, reports": (
        ("steps_per_report", int, "N", "steps between two lines"),
        ("steps_per_eval", int, "N", "steps between two validations"),
        ("val_batches", int, "N", "batches of a validation; -1 for all"),
        ("save_every", int, "N", "steps between two checkpoints"),
        ("keep", int, "N", "checkpoints that stay, beside the best"),
        ("save_best", bool, None, "save whenever the validation loss is the lowest yet"),
        ("early_stop", int, "N", "end after N validations without a lower loss"),
        ("sample_prompt", str, "TEXT", "prompt answered at every validation; may be repeated"),
        ("log", str, "KINDS", "files of metrics, with commas; jsonl and csv are always written"),
    ),
}
FLAGS = tuple(flag for group in GROUPS.values() for flag in group)
PLACES = ("model", "data", "adapter_path", "progress")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options; none has a default yet, so that a YAML file can come between."""
    absent = argparse.SUPPRESS
    add = parser.add_argument
    add("model_folder", metavar="MODEL", nargs="?", help="Hugging Face folder (bundled model)")
    add("--model", default=absent, metavar="PATH", help="the same as MODEL")
    add("--data", default=absent, metavar="PATH", help="folder with train.jsonl, or one file")
    add("-c", "--config", metavar="FILE", help="YAML file of options; the command line wins")
    add("--adapter-path", default=absent, metavar="DIR", help="folder of the run (adapters)")
    text = "go on with a run: that in --adapter-path, or another's folder or checkpoint"
    add("--resume", nargs="?", const="auto", metavar="auto|PATH", help=text)
    add("--preset", choices=tuple(PRESETS), help="the defaults of another tool")
    add("--dry-run", action="store_true", help="do everything but train, and write nothing")
    add("--progress", default=absent, choices=KINDS, help="how the run is shown (auto)")
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
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
    """Show a default, and the bundled model's own."""
    plain, own = DEFAULTS[name], recipe.BUNDLED.get(name)
    if plain is None or plain == ():
        return ""
    shown = {True: "yes", False: "no"}.get(plain, plain) if isinstance(plain, bool) else plain
    shown = ",".join(plain) if isinstance(plain, tuple) else shown
    return f" ({shown}{f'; bundled model: {own:g}' if own is not None else ''})"
