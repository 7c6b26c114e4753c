"""Import an adapter from PEFT, mlx-lm or Orbax as a run, for eval, generate and fuse."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from jax_lora import peft
from jax_lora.adapter import Adapter
from jax_lora.checkpoint import load_adapter, save_adapter
from jax_lora.cli.base_model import BaseModel, load_base
from jax_lora.cli.downloads import find_folder
from jax_lora.cli.names import add_name
from jax_lora.cli.options import add_model_option
from jax_lora.cli.parser import Parser
from jax_lora.errors import ConfigError
from jax_lora.finetune.run_folder import RunFolder, claimed
from jax_lora.finetune.settings import DTYPES
from jax_lora.finetune.tasks import CLASSES
from jax_lora.models.save_checkpoint import save
from jax_lora.models.tokenizer_files import copy_companions

HELP = "import an adapter from PEFT or mlx-lm"
EXAMPLE = "jax-lora import --adapter-path peft --model path/to/model --save-path run"
# Format -> the file that identifies it.
MARKS = {
    "peft": "adapter_model.safetensors",
    "mlx": "adapters.safetensors",
    "orbax": "adapter.json",
}


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    text = "folder or Hub name of the adapter (required)"
    add_name(parser, "--adapter-path", text, metavar="DIR", required=True)
    add_model_option(parser, "required; bundled is the model in the package", required=True)
    text = "run folder to create; after DIR, --adapter-path is an alias [adapters]"
    add_name(parser, "--save-path", text, default="adapters", metavar="RUN")
    add = parser.section("format").add_argument
    text = "format of the adapter [detected by file name]"
    add("--from", dest="source", choices=tuple(MARKS), help=text)
    text = "dtype of the base model; auto: float32 on a CPU [auto]"
    add("--dtype", default="auto", choices=DTYPES, help=text)


def run(options: argparse.Namespace) -> int:
    """Create the run, and return the exit code."""
    source = find_folder(options.adapter_path)
    kind = options.source or _detect_format(source)
    with claimed(options.save_path) as lock:
        loaded = load_base(options.model, options.dtype)
        base, adapter = _read(kind, source, loaded)
        folder, moved = RunFolder.prepare(options.save_path, lock)
        if moved is not None:
            print(f"the earlier run in {folder.path} is now in {moved}")
        with folder.emptied_on_failure():
            if base.model is not loaded.model:
                base = _keep_base(base, folder.path / "base", source)
            note = f"Imported from the adapter in {options.adapter_path}."
            folder.write_config(_settings(base, adapter), note=note)
            folder.save(0, lambda path: save_adapter(path, adapter, base=base.variables))
    count = len(adapter.pairs) + len(adapter.whole) + len(adapter.rows)
    found = f"{count} adapted leaves, {adapter.size:,} parameters"
    print(f"{folder.path}: {found}, from {options.adapter_path}")
    path = shlex.quote(str(folder.path))
    print(f"Next: jax-lora generate --adapter-path {path} --prompt TEXT")
    return 0


def _detect_format(folder: Path) -> str:
    found = [kind for kind, mark in MARKS.items() if (folder / mark).is_file()]
    if len(found) == 1:
        return found[0]
    if folder.is_dir():
        inside = ", ".join(sorted(each.name for each in folder.iterdir())[:8])
        got = f"a folder with {inside}" if inside else "an empty folder"
    else:
        got = "no such folder"
    raise ConfigError(
        f"import {folder}",
        got=got,
        expected=f"a folder with one of {', '.join(MARKS.values())}",
        fix=f"Check the path, or add --from {'|'.join(MARKS)}.",
    )


def _read(kind: str, folder: Path, base: BaseModel) -> tuple[BaseModel, Adapter]:
    """Read the adapter, and apply the changes that PEFT made to the base model."""
    if kind == "orbax":
        return base, load_adapter(folder, base=base.variables)
    if kind == "mlx":
        return base, peft.load_mlx(folder, base.variables, names=base.model.hf_names)
    model, variables, adapter = peft.load_model(folder, base.model, base.variables)
    base = dataclasses.replace(base, model=model, variables=variables, start=variables)
    return base, adapter


def _keep_base(base: BaseModel, target: Path, adapter: Path) -> BaseModel:
    """Save a changed base model in the run folder, where the other subcommands find it."""
    save(target, base.model, base.variables["params"])
    copy_companions(base.folder, target)
    copy_companions(adapter, target)  # its tokenizer, if there is one, has the added tokens
    print(f"{target}: {base.name} with the changes that PEFT made before training")
    return dataclasses.replace(base, name=str(target), folder=target)


def _settings(base: BaseModel, adapter: Adapter) -> dict[str, Any]:
    """Return the settings for the other subcommands, and for training such an adapter again."""
    config = adapter.config
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    return {
        "model": base.place,
        "task": base.task,
        "labels": list(base.model.config.labels) if base.task == CLASSES else [],
        "dtype": base.dtype,
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "rank": config.rank,
        "alpha": config.alpha,
        "rslora": config.use_rslora,
        "dropout": config.dropout,
        "targets": targets,
    }
