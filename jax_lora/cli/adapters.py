"""Load an adapter with the base model that it was trained on."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_lora.adapter import Adapter
from jax_lora.checkpoint import load_adapter
from jax_lora.cli.base_model import BUNDLED, BaseModel, load_base_of_run
from jax_lora.cli.options import model_argument
from jax_lora.data.tokenizer_identity import identity_changes
from jax_lora.errors import ConfigError, format_error
from jax_lora.finetune.commit_mark import check_mark
from jax_lora.finetune.run_folder import find_checkpoint, read_run_config
from jax_lora.finetune.training_state import has_state, read_record
from jax_lora.merge import merge
from jax_lora.models import load


@dataclasses.dataclass(frozen=True)
class Trained:
    """An adapter and the model that it was trained on.

    Args:
      base: The model.
      adapter: The adapter.
      checkpoint: The folder that the adapter was read from.
    """

    base: BaseModel
    adapter: Adapter
    checkpoint: Path


def find_run(path: str) -> tuple[Path, dict[str, Any]]:
    """Find a checkpoint and the settings of its run.

    Args:
      path: `--adapter-path`.

    Returns:
      The checkpoint's folder, and the settings, which may be empty.
    """
    checkpoint = find_checkpoint(path)
    check_mark(checkpoint)
    return checkpoint, read_run_config(checkpoint)


def warn_of_changes(base: BaseModel, checkpoint: Path) -> None:
    """Say on standard error if the checkpoint was trained with another tokenizer or template."""
    if not has_state(checkpoint):
        return
    for change in identity_changes(read_record(checkpoint).get("text"), base.identity):
        print(f"warning: since {checkpoint} was trained, {change}", file=sys.stderr)


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_trained` reads."""
    add = parser.add_argument
    add(
        "--adapter-path",
        default="adapters",
        metavar="DIR",
        help="run folder or checkpoint [adapters]",
    )
    add("--model", metavar="PATH", help="folder of the base model [from the run]")


def load_trained(options: argparse.Namespace) -> Trained:
    """Load an adapter and its base model.

    Args:
      options: The values of `add_adapter_options`.

    Returns:
      Both, the base model in the dtype of the training run.
    """
    checkpoint, settings = find_run(options.adapter_path)
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
    warn_of_changes(base, checkpoint)
    return Trained(base, load_adapter(checkpoint, base=base.variables), checkpoint)


def load_for_inference(
    options: argparse.Namespace, command: str, tasks: Sequence[str], default: str | None = BUNDLED
) -> tuple[BaseModel, Any, Path | None]:
    """Load a base model with the adapter of `--adapter-path` merged, or the base model alone.

    Args:
      options: The values of `add_model_options` and `--adapter-path`.
      command: The subcommand, for messages.
      tasks: The tasks that the subcommand is for.
      default: The model if neither the options nor the run name one; None: there is no default.

    Returns:
      The base model, the variables to run, and the checkpoint, or None.

    Raises:
      ConfigError: There is no model.
    """
    checkpoint, settings = None, {}
    if options.adapter_path is not None:
        checkpoint, settings = find_run(options.adapter_path)
    name = model_argument(options) or settings.get("model", default)
    if name is None:
        raise ConfigError(
            format_error(
                command,
                got="no model",
                expected=f"a model for {' or '.join(tasks)}",
                fix="Add MODEL, or --adapter-path with the folder of a run.",
            )
        )
    base = load_base_of_run(name, settings, command, tasks)
    return base, base.variables if checkpoint is None else merged(base, checkpoint), checkpoint


def is_model(checkpoint: Path) -> bool:
    """Return whether a checkpoint is a whole model, from full fine-tuning."""
    return (checkpoint / "model.safetensors").is_file()


def merged(base: BaseModel, checkpoint: Path) -> Any:
    """Merge a saved adapter into its base model.

    Args:
      base: The model that the adapter was trained on.
      checkpoint: The adapter, or a whole model from full fine-tuning.

    Returns:
      `{"params": params}` after training.
    """
    warn_of_changes(base, checkpoint)
    if is_model(checkpoint):
        return {"params": load(checkpoint, dtype=base.dtype)[1]}
    return merge(base.variables, load_adapter(checkpoint, base=base.variables))
