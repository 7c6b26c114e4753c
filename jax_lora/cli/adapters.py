"""Loads an adapter with the base model that it was trained on."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jax_lora.adapter import Adapter
from jax_lora.checkpoint import load_adapter
from jax_lora.cli.base_model import BUNDLED, BaseModel, load_base_of_run
from jax_lora.errors import ConfigError, format_error
from jax_lora.finetune.run_folder import find_checkpoint, read_run_config
from jax_lora.merge import merge
from jax_lora.models import load


@dataclasses.dataclass(frozen=True)
class Trained:
    """An adapter and the model that it was trained on.

    Args:
      base: The model.
      adapter: The adapter.
      checkpoint: The folder that it was read from.
    """

    base: BaseModel
    adapter: Adapter
    checkpoint: Path


def checkpoint_of(path: str) -> tuple[Path, dict[str, Any]]:
    """Find a checkpoint and the settings of its run.

    Args:
      path: `--adapter-path`.

    Returns:
      The checkpoint's folder, and the settings, which may be empty.
    """
    checkpoint = find_checkpoint(path)
    return checkpoint, read_run_config(checkpoint)


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_trained` reads."""
    add = parser.add_argument
    add(
        "--adapter-path",
        default="adapters",
        metavar="DIR",
        help="run or checkpoint [adapters]",
    )
    add("--model", metavar="PATH", help="folder of the base model [the run's]")


def load_trained(options: argparse.Namespace) -> Trained:
    """Load an adapter and its base.

    Args:
      options: Those of `add_adapter_options`.

    Returns:
      Both, the base in the type that it had in training.
    """
    checkpoint, settings = checkpoint_of(options.adapter_path)
    if is_model(checkpoint):
        raise ConfigError(
            format_error(
                f"--adapter-path {checkpoint}",
                got="a whole model, from full fine-tuning",
                expected="an adapter",
                fix="The checkpoint is a Hugging Face folder already: use it as a MODEL.",
            )
        )
    name = options.model or settings.get("model", BUNDLED)
    base = load_base_of_run(name, settings)
    return Trained(base, load_adapter(checkpoint, base=base.variables), checkpoint)


def is_model(checkpoint: Path) -> bool:
    """Tell the checkpoint of full fine-tuning, which is a whole model, from an adapter."""
    return (checkpoint / "model.safetensors").is_file()


def merged(base: BaseModel, checkpoint: Path) -> Any:
    """Merge a saved adapter into its base: from then on it costs nothing.

    Args:
      base: The model that the adapter was trained on.
      checkpoint: The adapter, or the whole model that full fine-tuning made of the base.

    Returns:
      `{"params": params}` as they are after training.
    """
    if is_model(checkpoint):
        return {"params": load(checkpoint, dtype=base.dtype)[1]}
    return merge(base.variables, load_adapter(checkpoint, base=base.variables))
