"""Export an adapter for PEFT (and servers that load its files), mlx-lm, or Orbax."""

from __future__ import annotations

import argparse
from pathlib import Path

from jax_lora import peft
from jax_lora.checkpoint import save_adapter
from jax_lora.cli.adapters import LoadedAdapter, add_adapter_options, load_adapter_with_base
from jax_lora.errors import ConfigError, format_error

HELP = "export an adapter for PEFT, vLLM or mlx-lm"
EXAMPLE = "jax-lora export served --adapter-path run --to peft --for vllm"
FORMATS = {"peft": "PEFT", "mlx": "mlx-lm", "orbax": "jl.load_adapter"}  # format -> its reader


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder to write")
    add_adapter_options(parser)
    add("--to", default="peft", choices=[*FORMATS], help="format [peft]")
    add(
        "--for",
        dest="target",
        choices=("vllm",),
        help="server that will load the files; an adapter feature that it does not support is an "
        "error",
    )
    add(
        "--base-model",
        metavar="NAME",
        help="name of the base model in adapter_config.json [its Hub name, or its folder]",
    )


def run(options: argparse.Namespace) -> int:
    """Write the files, and return the exit code."""
    _check(options)
    loaded = load_adapter_with_base(options)
    adapter, base = loaded.adapter, loaded.base
    names = base.model.hf_names
    if options.to == "peft":
        save_for_peft(options.folder, loaded, options.base_model, target=options.target)
    elif options.to == "mlx":
        peft.save_mlx(options.folder, adapter, names=names)
    else:
        save_adapter(options.folder, adapter, base=base.variables)
    reader = "vLLM" if options.target else FORMATS[options.to]
    print(f"Exported {loaded.checkpoint} (base model {base.name}) to {options.folder} for {reader}")
    return 0


def save_for_peft(
    folder: str | Path, loaded: LoadedAdapter, base_model: str | None, *, target: str | None = None
) -> None:
    """Save an adapter in the format of PEFT.

    Args:
      folder: The folder to write.
      loaded: The adapter and its base model.
      base_model: Name of the base model in the configuration; None: its Hub name and commit, or
        its folder.
      target: The server that will load the files; None: PEFT itself.
    """
    base = loaded.base
    hub = base.hub_name if base_model is None else None
    peft.save(
        folder,
        loaded.adapter,
        names=base.model.hf_names,
        base_model=base_model or (str(base.folder) if hub is None else hub.repo),
        revision=None if hub is None else hub.revision,
        base=base.variables,
        target=target,
    )


def _check(options: argparse.Namespace) -> None:
    for flag, value in (("--for", options.target), ("--base-model", options.base_model)):
        if value is not None and options.to != "peft":
            raise ConfigError(
                format_error(
                    f"{flag} {value}",
                    got=f"--to {options.to}",
                    expected="--to peft, the only format with this option",
                    fix=f"Remove {flag}, or use --to peft.",
                )
            )
