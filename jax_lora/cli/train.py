"""Fine-tune a Hugging Face model with LoRA. Without arguments: the bundled model and task."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.adapter import Adapter
from jax_lora.cli.base_model import BUNDLED, BaseModel, data_folder, load_base
from jax_lora.cli.options import DEFAULTS, given, make_settings, read_config_file
from jax_lora.data.batches import Batches
from jax_lora.data.data_folder import DataSet, read_data
from jax_lora.data.examples import Examples, make_examples
from jax_lora.finetune import recipe
from jax_lora.finetune.devices import use_all_cores
from jax_lora.finetune.loop import TrainLoop
from jax_lora.finetune.run_folder import RunFolder
from jax_lora.finetune.schedule import SHAPES
from jax_lora.finetune.settings import DTYPES, TRUNCATIONS, TrainSettings
from jax_lora.init import lora_init
from jax_lora.report.progress import RunPlan
from jax_lora.report.screen import KINDS, make_reporter
from jax_lora.transform import find_kernels

HELP = "fine-tune a model; with no arguments, the bundled one on the bundled task"

# Flag, type, metavar or choices, and what it says in --help.
FLAGS: tuple[tuple[str, Any, Any, str], ...] = (
    ("rank", int, "N", "rank of the factors"),
    ("alpha", float, "X", "the adapter's scale is alpha / rank"),
    ("dropout", float, "P", "share of the adapter's inputs dropped in training"),
    ("targets", str, "NAMES", "all-linear, attention, mlp, or names and globs with commas"),
    ("epochs", float, "N", "passes over the data"),
    ("iters", int, "N", "steps, instead of epochs"),
    ("batch_size", int, "N", "rows in memory together"),
    ("grad_accumulation_steps", int, "N", "batches to an update"),
    ("max_seq_length", int, "N", "longest row in tokens"),
    ("truncate", str, TRUNCATIONS, "what becomes of longer rows"),
    ("learning_rate", float, "X", "its peak"),
    ("lr_schedule", str, SHAPES, "shape after the warm-up"),
    ("warmup", float, "P", "share of the steps in which the learning rate rises"),
    ("weight_decay", float, "X", "weight decay of the factors"),
    ("max_grad_norm", float, "X", "clip the gradient's norm; 0 does not"),
    ("steps_per_report", int, "N", "steps between two lines"),
    ("steps_per_eval", int, "N", "steps between two validations"),
    ("val_batches", int, "N", "batches of a validation; -1 for all"),
    ("save_every", int, "N", "steps between two checkpoints"),
    ("keep", int, "N", "checkpoints that stay, beside the best"),
    ("seed", int, "N", "chooses factors, order and dropout"),
    ("dtype", str, DTYPES, "of the base; auto: float32 on a CPU"),
)
PLACES = ("model", "data", "adapter_path", "progress")
SWITCHES = ("rslora", "mask_prompt")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options; none has a default yet, so that a YAML file can come between."""
    absent = argparse.SUPPRESS
    add = parser.add_argument
    add("model_folder", metavar="MODEL", nargs="?", help="Hugging Face folder (bundled model)")
    add("--model", default=absent, metavar="PATH", help="the same as MODEL")
    add("--data", default=absent, metavar="PATH", help="folder with train.jsonl, or one file")
    add("-c", "--config", metavar="FILE", help="YAML file of options; the command line wins")
    add("--adapter-path", default=absent, metavar="DIR", help="folder of the run (adapters)")
    add("--progress", default=absent, choices=KINDS, help="how the run is shown (auto)")
    for name, kind, values, text in FLAGS:
        flag = "--" + name.replace("_", "-")
        choices = {"choices": values} if isinstance(values, tuple) else {"metavar": values}
        shown = f"{text} {_default(name)}"
        add(flag, type=kind, default=absent, help=shown.replace("%", "%%"), **choices)
    boolean = argparse.BooleanOptionalAction
    add("--rslora", action=boolean, default=absent, help="scale by alpha / sqrt(rank) (no)")
    text = "learn answers only (yes for chat and completions, no for text)"
    add("--mask-prompt", action=boolean, default=absent, help=text)


def _default(name: str) -> str:
    """Show a default, and the bundled model's own."""
    plain = DEFAULTS[name]
    own = recipe.BUNDLED.get(name)
    beside = f"; bundled model: {own:g}" if own is not None else ""
    return f"({plain if plain is not None else 'as epochs say'}{beside})"


def run(options: argparse.Namespace) -> int:
    """Train, and return the exit code."""
    places, settings = _choose(options)
    use_all_cores()
    reporter = make_reporter(places.get("progress", "auto"))
    data = read_data(data_folder(places.get("data")))
    train_rows = data.split("train")
    base = load_base(places.get("model"), settings.dtype)
    longest = min(settings.max_seq_length, base.model.config.max_position_embeddings)
    # The adapter belongs to a base of this type, so the type is kept and not chosen again.
    settings = dataclasses.replace(settings, max_seq_length=longest, dtype=base.dtype)
    train = _examples(data, "train", base, settings)
    valid = _examples(data, "valid", base, settings) if "valid" in data.splits else None
    adapter = make_adapter(base, settings)
    folder, moved = RunFolder.prepare(places.get("adapter_path", "adapters"), keep=settings.keep)
    folder.write_config(_saved_config(places, settings))
    rows = settings.batch_size * settings.grad_accumulation_steps
    loop = TrainLoop(
        base.model,
        base.variables,
        adapter,
        settings,
        batches=Batches.of(train.rows, rows, seed=settings.seed),
        validation=Batches.of(valid.rows, rows) if valid is not None else None,
        run=folder,
        reporter=reporter,
    )
    notes = _notes(train, train_rows.blank, len(train_rows.rows))
    if moved is not None:
        notes.append(f"the run that was in {folder.path} is now in {moved}")
    reporter.planned(
        RunPlan(
            model=f"{base.name}, {base.size:,} parameters",
            adapter=_describe(adapter, settings, base.size),
            data=f"{data.path}: {_counts(train, valid)}",
            steps=loop.steps,
            notes=tuple(notes),
        )
    )
    result = loop.train()
    if result.interrupted:
        print(f"{result.interrupted}: stopped after {result.steps} steps; all of them are saved.")
        print(f"Try what was learned: jax-lora eval --adapter-path {result.checkpoint}")
        return 130
    print(f"Next: jax-lora eval --adapter-path {folder.path} --compare-base")
    return 0


def _choose(options: argparse.Namespace) -> tuple[dict[str, Any], TrainSettings]:
    """Put the values together: command line, YAML file, recipe of the bundled model, defaults."""
    names = [*DEFAULTS, *PLACES]
    values = read_config_file(options.config, names) if options.config else {}
    values |= given(options, names)
    if options.model_folder is not None:
        values["model"] = options.model_folder
    places = {name: values.pop(name) for name in PLACES if name in values}
    if places.get("model", BUNDLED) in (None, BUNDLED):
        values = recipe.BUNDLED | values
    return places, make_settings(
        {name: values[name] for name in values if values[name] is not None}
    )


def _examples(data: DataSet, split: str, base: BaseModel, settings: TrainSettings) -> Examples:
    return make_examples(
        data.split(split),
        base.tokenizer,
        max_length=settings.max_seq_length,
        truncate=settings.truncate,
        mask_prompt=settings.mask_prompt,
    )


def make_adapter(base: BaseModel, settings: TrainSettings) -> Adapter:
    """Make a fresh adapter for a model.

    Args:
      base: The model.
      settings: Rank, scale, targets and seed.

    Returns:
      The adapter.
    """
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    kernels = find_kernels(base.model.apply, base.variables, ids)
    key = jax.random.key(settings.seed)
    return lora_init(key, base.variables, settings.lora_config(), kernels=kernels)


def _saved_config(places: dict[str, Any], settings: TrainSettings) -> dict[str, Any]:
    """Name the places such that another command finds them from anywhere."""
    saved: dict[str, Any] = {}
    for name in ("model", "data"):
        value = places.get(name) or BUNDLED
        saved[name] = value if value == BUNDLED else str(Path(value).resolve())
    return saved | settings.as_dict()


def _describe(adapter: Adapter, settings: TrainSettings, size: int) -> str:
    return (
        f"rank {settings.rank}, alpha {settings.alpha:g}, {len(adapter.pairs)} kernels, "
        f"{adapter.size:,} trainable parameters ({adapter.size / size:.2%})"
    )


def _counts(train: Examples, valid: Examples | None) -> str:
    tokens = sum(len(example.ids) for example in train.rows)
    held_out = f", {len(valid.rows)} valid" if valid is not None else ", no validation rows"
    return f"{len(train.rows)} train{held_out}; {tokens:,} tokens an epoch"


def _notes(train: Examples, blank: int, read: int) -> list[str]:
    notes = []
    if blank:
        notes.append(f"{read} rows read + 0 refused + {blank} blank lines skipped")
    if train.cut:
        notes.append(f"{train.cut} rows are cut at the longest length")
    if train.dropped:
        lines = ", ".join(map(str, train.dropped[:10]))
        notes.append(f"{len(train.dropped)} rows left out, nothing to learn: lines {lines}")
    return notes
