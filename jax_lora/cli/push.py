"""Upload an adapter, as PEFT reads it, or a model to the Hugging Face Hub.

Only weights, configuration and tokenizer are uploaded: no optimizer state, no metrics, no data.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jax_lora.cli.adapters import find_checkpoint_and_config, is_full_model, load_adapter_with_base
from jax_lora.cli.downloads import transfer
from jax_lora.cli.export import save_for_peft
from jax_lora.cli.names import add_name
from jax_lora.cli.options import add_model_option
from jax_lora.cli.parser import Parser
from jax_lora.errors import ConfigError
from jax_lora.hub.hub_name import HubName, parse_hub_name
from jax_lora.hub.repository_files import ADAPTER, CONFIG, is_peft, wanted_files
from jax_lora.hub.uploads import upload
from jax_lora.models.folder import weight_files

HELP = "upload an adapter or a model to the Hub"
EXAMPLE = """\
jax-lora push --adapter-path run --save-path owner/name --private
jax-lora push --model fused --save-path owner/name
"""
CARD = "README.md"


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    text = "run folder, checkpoint, PEFT folder, or Hugging Face folder [none: upload --model]"
    add_name(parser, "--adapter-path", text, metavar="DIR")
    text = "base model of the adapter; without an adapter, the model to upload"
    add_model_option(parser, "from the run", text=text)
    text = "repository, created if necessary (required)"
    add_name(parser, "--save-path", text, metavar="OWNER/NAME", required=True)
    add = parser.section("repository").add_argument
    add("--private", action="store_true", help="create a private repository")
    add("--revision", metavar="BRANCH", help="branch, created if necessary [the default branch]")
    text = "name of the base model in adapter_config.json [its Hub name, or the name of its folder]"
    add("--base-model", metavar="NAME", help=text)


def run(options: argparse.Namespace) -> int:
    """Upload the files, print the address, and return the exit code."""
    name = _repository(options)
    with _folder(options) as folder:
        files = _files(folder)
        address = upload(folder, files, name, private=options.private, reporting=transfer)
    print(f"{address}: {', '.join(files)}")
    return 0


def _repository(options: argparse.Namespace) -> HubName:
    name = parse_hub_name(options.save_path)
    if name is None or name.revision is not None:
        raise ConfigError(
            f"--save-path {options.save_path}",
            got="not the name of a repository",
            expected="owner/name",
            fix="Write your account, a slash and a name; a branch is --revision BRANCH.",
        )
    return dataclasses.replace(name, revision=options.revision)


@contextlib.contextmanager
def _folder(options: argparse.Namespace) -> Iterator[Path]:
    """Find the folder to upload, or write a temporary one with the adapter."""
    if options.adapter_path is None:
        options.adapter_path, options.model = options.model, None
    if options.adapter_path is None:
        raise ConfigError(
            "push",
            got="no --adapter-path and no --model",
            expected="a run, an adapter or a model to upload",
            fix="Add --adapter-path, or --model with the folder of a merged model.",
        )
    source = Path(options.adapter_path)
    if not is_peft(source) and not (source / CONFIG).is_file():
        source, _ = find_checkpoint_and_config(options.adapter_path)
        if not is_full_model(source):
            with tempfile.TemporaryDirectory() as scratch:
                trained = load_adapter_with_base(options)
                # A local path says nothing to others, so only the folder's name is uploaded.
                local = None if trained.base.hub_name else trained.base.folder.name
                save_for_peft(scratch, trained, options.base_model or local)
                yield Path(scratch)
            return
    for flag, value in (("--model", options.model), ("--base-model", options.base_model)):
        if value is not None:
            raise ConfigError(
                f"{flag} {value}",
                got=f"{source}, whose files are uploaded unchanged",
                expected="a run or a checkpoint of an adapter in --adapter-path",
                fix=f"Remove {flag}.",
            )
    yield source


def _files(folder: Path) -> list[str]:
    """List the files to upload; of the tensors, only those of the model or of the adapter."""
    weights = {ADAPTER} if is_peft(folder) else set(weight_files(folder))
    present = [each.name for each in folder.iterdir() if each.is_file()]
    chosen = [
        name
        for name in wanted_files(present)
        if name in weights or not name.endswith(".safetensors")
    ]
    return [*chosen, CARD] if CARD in present else chosen
