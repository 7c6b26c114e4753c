"""Export an adapter for PEFT (and servers that load its files), mlx-lm, or Orbax."""

from __future__ import annotations

import argparse

from jax_lora import peft
from jax_lora.checkpoint import save_adapter
from jax_lora.cli.adapters import add_adapter_options, load_trained
from jax_lora.cli.base_model import model_folder
from jax_lora.errors import ConfigError, format_error

HELP = "export an adapter for PEFT, vLLM or mlx-lm"
EXAMPLE = "jax-lora export served --adapter-path run --to peft --for vllm"
FORMATS = ("peft", "mlx", "orbax")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder to write")
    add_adapter_options(parser)
    add("--to", default="peft", choices=FORMATS, help="format [peft]")
    text = "server that will load the files; refuses what it does not support"
    add("--for", dest="server", choices=("vllm",), help=text)
    text = "name of the base model in adapter_config.json [its folder]"
    add("--base-model", metavar="NAME", help=text)


def run(options: argparse.Namespace) -> int:
    """Write the files, and return the exit code."""
    _check(options)
    trained = load_trained(options)
    adapter, base = trained.adapter, trained.base
    names = base.model.hf_names
    if options.to == "peft":
        peft.save(
            options.folder,
            adapter,
            names=names,
            base_model=options.base_model or str(model_folder(base.name)),
            base=base.variables,
            target=options.server,
        )
    elif options.to == "mlx":
        peft.save_mlx(options.folder, adapter, names=names)
    else:
        save_adapter(options.folder, adapter, base=base.variables)
    print(f"{options.folder}: {trained.checkpoint} of {base.name}, for {_reader(options)}")
    return 0


def _reader(options: argparse.Namespace) -> str:
    readers = {"peft": "PEFT", "mlx": "mlx-lm", "orbax": "jl.load_adapter"}
    return "vLLM" if options.server else readers[options.to]


def _check(options: argparse.Namespace) -> None:
    for flag, value in (("--for", options.server), ("--base-model", options.base_model)):
        if value is not None and options.to != "peft":
            raise ConfigError(
                format_error(
                    f"{flag} {value}",
                    got=f"--to {options.to}",
                    expected="--to peft, the only format with this option",
                    fix=f"Remove {flag}, or use --to peft.",
                )
            )
