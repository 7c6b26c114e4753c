"""Options that subcommands share, and the YAML file that can set them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jax_lora.cli.names import ALIASES, add_name, words_of
from jax_lora.cli.parser import Parser
from jax_lora.errors import ConfigError
from jax_lora.finetune.settings import TrainSettings
from jax_lora.storage import schema
from jax_lora.storage.yaml_files import read_yaml

_FIELDS = dataclasses.fields(TrainSettings)
DEFAULTS: dict[str, Any] = {field.name: field.default for field in _FIELDS}
# The annotations are strings: "float" or "float | None".
_FLOATS = frozenset(field.name for field in _FIELDS if str(field.type).startswith("float"))
MODEL_HELP = "Hugging Face folder, or Hub name: owner/name[@revision]"
ADAPTER_HELP = "run folder, checkpoint, or PEFT adapter: a folder or Hub name"
COLUMNS_HELP = "names of the data's columns, as in prompt=question,completion=answer"
CHAT_TEMPLATE_HELP = "one of the model's chat templates by name, or a .jinja file"
PROMPT_TEMPLATE_HELP = (
    "format of prompts without a chat template: a text with {prompt}, and {system} for system "
    r"messages, such as 'Question: {prompt}\nAnswer:', or a file of it"
)
_LISTS = ("targets", "labels", "log", "sample_prompt")


def add_subcommand(subparsers: Any, name: str, module: ModuleType) -> Parser:
    """Add a subcommand, and return its parser.

    Args:
      subparsers: From `add_subparsers`.
      name: Name of the subcommand.
      module: A module with `HELP`, `EXAMPLE` and `add_options`.
    """
    parser = subparsers.add_parser(
        name,
        help=module.HELP,
        description=_wrapped(str(module.__doc__)),
        epilog="examples:\n" + "\n".join(f"  {line}" for line in module.EXAMPLE.splitlines()),
        add_help=False,  # the section of general options comes last
    )
    module.add_options(parser)
    verb = parser.prog.partition(" ")[2]
    parser.set_defaults(verb=verb)
    if verb in ALIASES:  # the sections list the options
        words = "".join(f" [{word}]" for word in words_of(verb).values())
        parser.usage = f"{parser.prog}{words} [options]"
    return parser


def _wrapped(text: str) -> str:
    """Wrap paragraphs, which the help prints unchanged."""
    return "\n\n".join(textwrap.fill(part, 78) for part in text.strip().split("\n\n"))


def add_general_options(parser: Parser, *, reads_model: bool = False) -> None:
    """Add the options of all subcommands, and those of all subcommands that read a model."""
    add = parser.section("general").add_argument
    if reads_model:
        text = "sha256sum's output: check the model's files before they are read [not checked]"
        add("--pin", metavar="FILE", help=text)
        text = "field of config.json that does not change the outputs; repeatable [none]"
        add("--ignore", metavar="FIELD", action="append", help=text)
    absent = argparse.SUPPRESS  # `data --debug check` has the option twice
    add("--debug", action="store_true", default=absent, help="print the traceback of an error")
    add("-h", "--help", action="help", help="show this help and exit")


def add_columns_option(section: Any) -> None:
    """Add `--columns`, which `main` applies to all data that is read."""
    section.add_argument("--columns", metavar="FIELD=COLUMN,...", help=f"{COLUMNS_HELP} [none]")


def add_template_options(section: Any, default: str = "of the run, or the model's") -> None:
    """Add `--chat-template` and `--prompt-template`; without them, those of the run are used."""
    add = section.add_argument
    add("--chat-template", metavar="NAME|FILE", help=f"{CHAT_TEMPLATE_HELP} [{default}]")
    text = f"{PROMPT_TEMPLATE_HELP} [{default.partition(',')[0]}]"
    add("--prompt-template", metavar="TEXT|FILE", help=text)


def add_model_option(parser: Any, shown: str, text: str = MODEL_HELP, **settings: Any) -> None:
    """Add `--model`, whose default is `shown` in the help text, with settings of `add_name`."""
    add_name(parser, "--model", f"{text} [{shown}]", metavar="PATH", **settings)


PLACES = ("model", "data", "adapter_path", "progress")  # options that are paths or names
_PLACES = schema.fields(dict.fromkeys(PLACES, schema.optional(schema.TEXT)))


def read_config_file(path: str | Path, allowed: Iterable[str]) -> dict[str, Any]:
    """Read a YAML file of options; its keys are the names of flags, with `-` or `_`.

    Raises:
      ConfigError: The file cannot be read, or has an unknown key or a path that is not a string.
    """
    values = read_yaml(
        Path(path),
        ConfigError,
        where=f"-c {path}",
        expected="a YAML file of options",
        fix='Write lines such as "learning_rate: 2e-4".',
    )
    named = {key.replace("-", "_"): value for key, value in values.items()}
    refuse_unknown(path, named, sorted(allowed))
    wrong = list(schema.problems(named, _PLACES))
    if wrong:
        expected, fix = "paths and names as strings", 'Quote it, as in data: "2024".'
        raise ConfigError(f"-c {path}", got=wrong, expected=expected, fix=fix)
    # YAML reads 2e-4 as a string, because it requires a decimal point: 2.0e-4.
    return {key: value if key in PLACES else _number(value) for key, value in named.items()}


def refuse_unknown(path: str | Path, named: Mapping[str, Any], allowed: list[str]) -> None:
    """Refuse a file with keys that are not options; the closest option is named."""
    for key in named:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            fix = f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(allowed)}."
            raise ConfigError(
                f"-c {path}", got=f"the key {key!r}", expected="a known option", fix=fix
            )


def _number(value: Any) -> Any:
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Collect the options of these names, whose default is `argparse.SUPPRESS`, that were given."""
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def make_settings(values: Mapping[str, Any]) -> TrainSettings:
    """Create settings from values by name, with defaults for the rest."""
    return TrainSettings(**{name: _converted(name, value) for name, value in values.items()})


def _converted(name: str, value: Any) -> Any:
    """Convert comma-separated names to a tuple, and an integer to a float where one is needed."""
    if name in _FLOATS and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if name not in _LISTS:
        return value
    if isinstance(value, str):
        if name == "targets" and "," not in value:
            return value
        value = [value] if name == "sample_prompt" else value.split(",")
    return tuple(str(each).strip() for each in value) if isinstance(value, list) else value


def at_least_one(text: str) -> int:
    """Parse a count, for argparse.

    Raises:
      argparse.ArgumentTypeError: Not an integer of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)
