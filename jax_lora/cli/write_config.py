"""Write a configuration file with every option of train, its meaning, and its default."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import yaml

from jax_lora.cli import train_flags
from jax_lora.cli.base_model import BUNDLED
from jax_lora.cli.options import DEFAULTS
from jax_lora.cli.presets import PRESETS
from jax_lora.errors import ConfigError, format_error

HELP = "write a commented configuration file for train -c"
_PLACES = {"model": BUNDLED, "data": BUNDLED, "adapter_path": "adapters", "progress": "auto"}
_WIDTH = 78


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add = parser.add_argument
    add("file", metavar="FILE", nargs="?", default="lora.yaml", help="the new file [lora.yaml]")
    add("--preset", choices=tuple(PRESETS), help="use the defaults of another tool")


def run(options: argparse.Namespace) -> int:
    """Write the file, and return the exit code."""
    path = Path(options.file)
    text = make_text(options.preset)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(
            format_error(
                f"init {path}",
                got="a file of that name, which is left as it is",
                expected="a new name",
                fix="Name another file: jax-lora init FILE.",
            )
        ) from error
    print(f"{path}: every option of train with its default")
    print(f"Next: jax-lora train -c {path}")
    return 0


def make_text(preset: str | None = None) -> str:
    """Make the file's text, of the options that `train` has.

    Args:
      preset: A name in `PRESETS`, whose values are switched on; None for none.

    Returns:
      YAML for `train -c`.
    """
    chosen = PRESETS[preset] if preset else {}
    lines = [
        "# Options of jax-lora train. Take the # off a line to change what it says; the",
        "# command line beats this file: jax-lora train -c lora.yaml --rank 8",
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
    """Write a value as YAML, in which JSON's values mean the same."""
    if isinstance(value, str) and yaml.safe_load(value) == value:
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def train_options() -> dict[str, str]:
    """List the options that `train` takes from a file.

    Returns:
      Name -> its text in `train --help`.
    """
    recorder = _Recorder()
    train_flags.add_options(recorder)  # pyright: ignore[reportArgumentType]  it is asked for no more
    texts, known = recorder.texts, {*DEFAULTS, *train_flags.PLACES}
    texts["model"] = texts["model_folder"]  # --model only says that it is the same
    return {key: text for key, text in texts.items() if key in known}


class _Recorder:
    """Stands for a parser, and writes down what is added to it."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def add_argument(self, *flags: str, **settings: Any) -> None:
        long = next((flag for flag in flags if flag.startswith("--")), flags[0])
        key = settings.get("dest") or long.removeprefix("--").replace("-", "_")
        choices = settings.get("choices")
        text = str(settings.get("help", "")).replace("%%", "%")
        self.texts[key] = text + (f": {', '.join(map(str, choices))}" if choices else "")

    def add_argument_group(self, *_: Any, **__: Any) -> _Recorder:
        return self

    add_mutually_exclusive_group = add_argument_group
