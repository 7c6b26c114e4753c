"""Load an adapter with the base model that it was trained on."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_lora import peft
from jax_lora.adapter import Adapter, combine, is_weight
from jax_lora.checkpoint import load_adapter
from jax_lora.cli.base_model import BUNDLED, BaseModel, load_base_of_run, model_folder
from jax_lora.cli.downloads import find_folder
from jax_lora.cli.names import add_name
from jax_lora.cli.options import ADAPTER_HELP, add_model_option
from jax_lora.cli.parser import Parser
from jax_lora.data.prompt_template import prompt_template_text
from jax_lora.data.template_files import choose_template
from jax_lora.data.tokenizer_identity import identity_changes
from jax_lora.errors import ConfigError
from jax_lora.finetune.commit_mark import check_mark
from jax_lora.finetune.memory import available_memory
from jax_lora.finetune.run_folder import find_checkpoint, read_run_config
from jax_lora.finetune.run_template import read_run_template
from jax_lora.finetune.training_state import has_state, read_record
from jax_lora.hub.hub_name import parse_hub_name
from jax_lora.hub.repository_files import is_peft
from jax_lora.merge import merge
from jax_lora.models import load
from jax_lora.models.mesh_sharding import sharding_like
from jax_lora.peft.adapter_config import read_config
from jax_lora.quantize import dequantize, is_quantized


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """An adapter and the base model that it was trained on.

    Args:
      base: The base model.
      adapter: The adapter.
      checkpoint: The folder that the adapter was read from.
      settings: The settings of its run; they may be empty.
    """

    base: BaseModel
    adapter: Adapter
    checkpoint: Path
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def find_checkpoint_and_config(path: str) -> tuple[Path, dict[str, Any]]:
    """Find an adapter and the settings of its run.

    Args:
      path: `--adapter-path`: a run, a checkpoint, or an adapter of PEFT, which may be a Hub name.

    Returns:
      The folder of the checkpoint or adapter, and the settings, which may be empty.
    """
    folder = find_folder(path)
    if is_peft(folder):
        return folder, _settings_of_peft(folder)
    checkpoint = find_checkpoint(folder)
    check_mark(checkpoint)
    return checkpoint, read_run_config(checkpoint)


def _settings_of_peft(folder: Path) -> dict[str, Any]:
    """Return the base model that PEFT recorded, at its revision if it is a Hub name."""
    config = read_config(folder)
    local = config["base_model_name_or_path"]
    name = parse_hub_name(local or "")
    if name is not None:
        return {"model": str(dataclasses.replace(name, revision=config["revision"]))}
    return {} if local is None else {"model": local}


def warn_if_tokenizer_changed(base: BaseModel, checkpoint: Path) -> None:
    """Say on standard error if the checkpoint was trained with another tokenizer or template."""
    if not has_state(checkpoint):
        return
    for change in identity_changes(read_record(checkpoint).get("text"), base.identity):
        fix = "Outputs may differ; restore the original tokenizer files."
        print(f"warning: since {checkpoint} was trained, {change}. {fix}", file=sys.stderr)


def templates_of_run(settings: Mapping[str, Any], checkpoint: Path | None) -> dict[str, str | None]:
    """Return the chat template and the prompt template of a run, for `Tokenizer.load`."""
    chat = None if checkpoint is None else read_run_template(checkpoint.parent)
    return {"chat_template": chat, "prompt_template": settings.get("prompt_template")}


def templates_of(
    options: argparse.Namespace,
    name: str | None,
    settings: Mapping[str, Any],
    checkpoint: Path | None,
) -> dict[str, str | None]:
    """Return the template of `add_template_options`, or those of a run, for `Tokenizer.load`.

    A subcommand may have none of these options, and a model no run.

    Raises:
      ConfigError: Both options are given, or there is no such template.
    """
    chat = getattr(options, "chat_template", None)
    prompt = getattr(options, "prompt_template", None)
    if chat is not None and prompt is not None:
        raise ConfigError(
            "--chat-template and --prompt-template",
            got="both",
            expected="one of them",
            fix="Remove one of them.",
        )
    if chat is not None:
        return {"chat_template": choose_template(model_folder(name), chat)}
    if prompt is not None:
        return {"prompt_template": prompt_template_text(prompt)}
    return templates_of_run(settings, checkpoint)


def add_adapter_options(parser: Parser) -> None:
    """Add the options that `load_adapter_with_base` reads."""
    text = f"{ADAPTER_HELP} [adapters]"
    add_name(parser, "--adapter-path", text, default="adapters", metavar="DIR")
    add_model_option(parser, "from the run")


def load_adapter_with_base(options: argparse.Namespace) -> LoadedAdapter:
    """Load the adapter of `add_adapter_options`, and its base model in the dtype of the run."""
    checkpoint, settings = find_checkpoint_and_config(options.adapter_path)
    if is_full_model(checkpoint):
        raise ConfigError(
            f"--adapter-path {checkpoint}",
            got="a full fine-tuning checkpoint",
            expected="an adapter",
            fix="A full fine-tuning checkpoint is already a Hugging Face folder. Use it "
            "directly; no export or fusing is needed.",
        )
    name = options.model or settings.get("model", BUNDLED)
    base = load_base_of_run(name, settings, templates=templates_of_run(settings, checkpoint))
    warn_if_tokenizer_changed(base, checkpoint)
    return LoadedAdapter(base, read_adapter(base, checkpoint), checkpoint, settings)


def read_adapter(base: BaseModel, folder: Path) -> Adapter:
    """Read an adapter, in the format of a checkpoint or of PEFT.

    Raises:
      ConfigError: PEFT changed the base model before training.
    """
    if not is_peft(folder):
        return load_adapter(folder, base=base.variables)
    model, _, adapter = peft.load_model(folder, base.model, base.variables)
    if model is not base.model:
        command = ["jax-lora", "import", "--adapter-path", str(folder), "--model", base.name]
        command += ["--save-path", "RUN"]
        raise ConfigError(
            f"--adapter-path {folder}",
            got="an adapter for a base model that PEFT changed before training",
            expected="an adapter for the base model itself, or a run",
            fix=f"Change the base model as PEFT did: {shlex.join(command)}",
        )
    return adapter


def load_for_inference(
    options: argparse.Namespace, command: str, tasks: Sequence[str], default: str | None = BUNDLED
) -> tuple[BaseModel, Any, Path | None]:
    """Load a base model with the adapter of `--adapter-path` merged, or the base model alone.

    Args:
      options: The values of `--model` and `--adapter-path`.
      command: The subcommand, for messages.
      tasks: The tasks that the subcommand is for.
      default: The model if neither the options nor the run name one; None: it is required.

    Returns:
      The base model, the variables, with the adapter merged, and the checkpoint, or None.

    Raises:
      ConfigError: No model was given.
    """
    checkpoint, settings = None, {}
    if options.adapter_path is not None:
        checkpoint, settings = find_checkpoint_and_config(options.adapter_path)
    name = options.model or settings.get("model", default)
    if name is None:
        raise ConfigError(
            command,
            got="no model",
            expected=f"a model for {' or '.join(tasks)}",
            fix="Add MODEL, or --adapter-path with the folder of a run.",
        )
    templates = templates_of(options, name, settings, checkpoint)
    base = load_base_of_run(name, settings, command, tasks, templates=templates)
    if checkpoint is None:
        return base, faster(base.variables), None
    return base, merge_checkpoint(base, checkpoint, donate=True), checkpoint


def is_full_model(checkpoint: Path) -> bool:
    """Return whether a checkpoint is from full fine-tuning, and has all parameters."""
    return (checkpoint / "model.safetensors").is_file()


def merge_checkpoint(base: BaseModel, checkpoint: Path, *, donate: bool = False) -> Any:
    """Merge a saved adapter into its base model.

    Args:
      base: The model that the adapter was trained on.
      checkpoint: The adapter, or a full fine-tuning checkpoint.
      donate: Free the weights of `base`, which then cannot be used.

    Returns:
      `{"params": params}` after training. An adapter of a quantized base is not merged if the
      merged weights, which are not quantized, take too much memory.
    """
    warn_if_tokenizer_changed(base, checkpoint)
    if is_full_model(checkpoint):
        place = sharding_like(base.variables["params"])
        return {"params": load(checkpoint, dtype=base.dtype, sharding=place)[1]}
    adapter = read_adapter(base, checkpoint)
    if is_quantized(base.variables) and not _fits_as_arrays(base.variables):
        return combine(base.variables, adapter)
    return dequantize(merge(base.variables, adapter, donate=donate))


def faster(variables: Any) -> Any:
    """Dequantize the variables of a quantized model, if they fit into memory as arrays.

    Quantized weights are computed anew for each generated token.
    """
    return dequantize(variables) if _fits_as_arrays(variables) else variables


def _fits_as_arrays(variables: Any) -> bool:
    """Tell whether the weights of a quantized model take a quarter of the memory or less."""
    leaves = jax.tree.leaves(variables, is_leaf=is_weight)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    available = available_memory()
    return available is not None and size <= available / 4
