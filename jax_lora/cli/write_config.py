"""Write a configuration file with every option of train, its meaning, and its default."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import textwrap
from pathlib import Path
from typing import Any

import yaml

from jax_lora.cli import train_flags
from jax_lora.cli.base_model import BUNDLED
from jax_lora.cli.names import add_name
from jax_lora.cli.options import DEFAULTS, PLACES
from jax_lora.cli.parser import Parser
from jax_lora.cli.presets import PRESETS
from jax_lora.errors import ConfigError
from jax_lora.storage.atomic_writes import write_file

HELP = "write a commented configuration file for train -c"
EXAMPLE = """\
jax-lora init --save-path lora.yaml
jax-lora init --save-path mlx.yaml --preset mlx
"""
_PLACES = {"model": BUNDLED, "data": BUNDLED, "adapter_path": "adapters", "progress": "auto"}
_WIDTH = 78


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    text = "file to write [lora.yaml]"
    add_name(parser, "--save-path", text, default="lora.yaml", metavar="FILE")
    add = parser.section("values").add_argument
    add("--preset", choices=tuple(PRESETS), help="use the defaults of another tool [none]")


def run(options: argparse.Namespace) -> int:
    """Write the file, and return the exit code."""
    path = Path(options.save_path)
    text = make_text(options.preset)
    if os.path.lexists(path):
        raise ConfigError(
            f"init {path}",
            got="an existing file, which is unchanged",
            expected="a new name",
            fix="Choose another name with --save-path.",
        )
    write_file(path, text, ConfigError)
    print(f"{path}: every option of train with its default")
    print(f"Next: jax-lora train -c {shlex.quote(str(path))}")
    return 0


def make_text(preset: str | None = None) -> str:
    """Create YAML for `train -c` from its options; the values of a preset are active in it."""
    chosen = PRESETS[preset] if preset else {}
    lines = [
        "# Options of jax-lora train. Remove the # from a line to set an option. Flags of the",
        "# command line override this file: jax-lora train -c lora.yaml --rank 8",
    ]
    for key, text in train_options().items():
        lines += ["", *textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")]
        lines.append(_setting(key, chosen))
    return "\n".join(lines) + "\n"


def _setting(key: str, chosen: dict[str, Any]) -> str:
    if key in chosen:
        return f"{key}: {_value(chosen[key])}"
    if key in _PLACES:
        return f"{key}: {_value(_PLACES[key])}"
    return f"# {key}: {_value(DEFAULTS.get(key))}"


def _value(value: Any) -> str:
    """Format a value as YAML, which includes JSON."""
    if isinstance(value, str) and yaml.safe_load(value) == value:
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def train_options() -> dict[str, str]:
    """Return the help texts of the options that `train` reads from a file, by name."""
    parser = Parser(prog="jax-lora train")
    train_flags.add_options(parser)
    return {
        action.dest: str(action.help).replace("%%", "%")
        + (f": {', '.join(map(str, action.choices))}" if action.choices else "")
        for action in parser._actions
        if action.dest in (*DEFAULTS, *PLACES)
    }
