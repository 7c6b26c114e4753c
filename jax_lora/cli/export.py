"""Export an adapter for PEFT (and servers that load its files), mlx-lm, llama.cpp, or Orbax."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from jax_lora import peft
from jax_lora.checkpoint import save_adapter
from jax_lora.cli.adapters import LoadedAdapter, add_adapter_options, load_adapter_with_base
from jax_lora.cli.names import add_name
from jax_lora.cli.parser import Parser
from jax_lora.errors import ConfigError
from jax_lora.peft.gguf import GGUF

HELP = "export an adapter for PEFT, vLLM, mlx-lm or llama.cpp"
EXAMPLE = "jax-lora export --adapter-path run --save-path served --to peft --for vllm"
# format -> its reader
FORMATS = {"peft": "PEFT", "mlx": "mlx-lm", "gguf": "llama.cpp", "orbax": "jl.load_adapter"}


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    add_adapter_options(parser)
    text = "folder to write (required)"
    add_name(parser, "--save-path", text, metavar="DIR", required=True)
    add = parser.section("format").add_argument
    add("--to", default="peft", choices=[*FORMATS], help="format [peft]")
    text = (
        "server that will load the files; an adapter feature that it does not support is an error "
        "[none]"
    )
    add("--for", dest="target", choices=("vllm",), help=text)
    text = "name of the base model in adapter_config.json [its Hub name, or its folder]"
    add("--base-model", metavar="NAME", help=text)


def run(options: argparse.Namespace) -> int:
    """Write the files, and return the exit code."""
    _check(options)
    loaded = load_adapter_with_base(options)
    adapter, base = loaded.adapter, loaded.base
    names = base.model.hf_names
    if options.to == "peft":
        save_for_peft(options.save_path, loaded, options.base_model, target=options.target)
    elif options.to == "mlx":
        peft.save_mlx(options.save_path, adapter, names=names)
    elif options.to == "gguf":
        peft.save_gguf(options.save_path, adapter, model=base.model)
    else:
        save_adapter(options.save_path, adapter, base=base.variables)
    reader = "vLLM" if options.target else FORMATS[options.to]
    source = f"{loaded.checkpoint} (base model {base.name})"
    print(f"Exported {source} to {options.save_path} for {reader}")
    if options.to == "gguf":
        gguf = f"{base.folder.name}.gguf"
        print(conversion(base.folder, gguf))
        adapter_file = str(Path(options.save_path, GGUF))
        served = shlex.join(["llama-cli", "-m", gguf, "--lora", adapter_file])
        print(f"Then run it with the adapter: {served}")
    return 0


def conversion(folder: Path, file: str) -> str:
    """Return a line with the command that converts a Hugging Face folder for llama.cpp."""
    command = ["python", "llama.cpp/convert_hf_to_gguf.py", str(folder), "--outfile", file]
    return f"For llama.cpp, convert {folder}: {shlex.join(command)}"


def save_for_peft(
    folder: str | Path, loaded: LoadedAdapter, base_model: str | None, *, target: str | None = None
) -> None:
    """Save an adapter in the format of PEFT, for PEFT itself or for a server that loads the files.

    The name of the base model in the configuration is by default its Hub name and commit, or its
    folder.
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
                f"{flag} {value}",
                got=f"--to {options.to}",
                expected="--to peft, the only format with this option",
                fix=f"Remove {flag}, or use --to peft.",
            )
