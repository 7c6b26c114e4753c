"""The names of what subcommands read and write: the same options everywhere, and their aliases."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from jax_lora.cli.parser import Parser
from jax_lora.errors import ConfigError

PLACES_TITLE = "model, data and output"
_CONVERTED = {"--data": ("PATH",), "--save-path": ("-o", "--output")}
# Subcommand -> option -> its other spellings; one without a dash is a word of the command line.
ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {"--model": ("MODEL",)},
    "generate": {"--model": ("MODEL",)},
    "chat": {"--model": ("MODEL",)},
    "eval": {"--model": ("MODEL",), "--save-path": ("--json",)},
    "predict": {"--model": ("MODEL",), "--save-path": ("--output",)},
    "fuse": {"--model": ("MODEL",)},
    "export": {"--save-path": ("DIR",)},
    "import": {"--adapter-path": ("DIR",)},
    "push": {"--adapter-path": ("SOURCE",), "--save-path": ("OWNER/NAME",)},
    "data check": {"--data": ("PATH",)},
    "data show": {"--data": ("PATH",)},
    "data convert": _CONVERTED,
    "data split": _CONVERTED,
    "plan": {"--model": ("MODEL",), "--save-path": ("--json",)},
    "init": {"--save-path": ("FILE",)},
    "plot": {"--adapter-path": ("RUN",), "--save-path": ("-o", "--output")},
}


def add_name(
    parser: Any,
    option: str,
    text: str,
    *,
    required: bool = False,
    into: Any = None,
    **settings: Any,
) -> None:
    """Add an option of `ALIASES` with its other spellings, one of which may be required.

    It is added to the argument group `into`, by default that of all such options, with further
    settings of `add_argument`.
    """
    place = into or parser.section(PLACES_TITLE)
    dest = _dest(option)
    spellings = ALIASES[parser.prog.removeprefix("jax-lora ")].get(option, ())
    for word in (each for each in spellings if not each.startswith("-")):
        count = "*" if settings.get("nargs") else "?"
        place.add_argument(f"word_{dest}", metavar=word, nargs=count, help=f"same as {option}")
    flags = [each for each in spellings if each.startswith("-")]
    place.add_argument(option, *flags, dest=dest, action=_Noted, help=text, **settings)
    if required:
        parser.set_defaults(required=(*(parser.get_default("required") or ()), option))


def words_of(verb: str) -> dict[str, str]:
    """Return the aliases of a subcommand that are words, by the name of the option's value."""
    return {
        _dest(option): word
        for option, spellings in ALIASES.get(verb, {}).items()
        for word in spellings
        if not word.startswith("-")
    }


def _dest(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


class _Noted(argparse.Action):
    """Store the value, and note that it was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.noted = {*getattr(namespace, "noted", ()), self.dest}


def parse(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; words without an option set the options that they are aliases of.

    Raises:
      ConfigError: Two spellings of an option have different values, or one is missing.
    """
    options, rest = parser.parse_known_args(arguments)
    verb: str = getattr(options, "verb", "")
    aliases = words_of(verb)
    words: list[str] = []
    for dest in aliases:
        value = getattr(options, f"word_{dest}")
        words += value if isinstance(value, list) else [] if value is None else [value]
    words += rest
    many = verb == "plot"
    if any(each.startswith("-") for each in rest) or (len(words) > len(aliases) and not many):
        near = difflib.get_close_matches(rest[0], parser.options_of(verb), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if many:
        options.adapter_path = [*(options.adapter_path or []), *words] or None
    else:
        _fill(options, verb, words, aliases)
    for option in getattr(options, "required", ()):
        if getattr(options, _dest(option), None) is None:
            raise ConfigError(
                verb,
                got=f"no {option}",
                expected=f"a value for {option}",
                fix=f"Add {option}; jax-lora {verb} --help has an example.",
            )
    return options


def _fill(
    options: argparse.Namespace, verb: str, words: list[str], aliases: dict[str, str]
) -> None:
    """Set options from words: the last word is that of the last option that was not given."""
    noted = getattr(options, "noted", ())
    if verb == "import" and words and "adapter_path" in noted and "save_path" not in noted:
        # Here --adapter-path was the run to create, before --save-path was added.
        options.save_path, noted = options.adapter_path, ()
    free = [dest for dest in aliases if dest not in noted]
    taken = [dest for dest in aliases if dest in noted]
    for dest, word in zip(reversed(free), reversed(words), strict=False):
        setattr(options, dest, word)
    for dest, word in zip(taken, words[: max(0, len(words) - len(free))], strict=False):
        if getattr(options, dest) != word:
            option = "--" + dest.replace("_", "-")
            raise ConfigError(
                f"{aliases[dest]} and {option}",
                got=f"{word} and {getattr(options, dest)}",
                expected=f"one value for {option}",
                fix="Remove one of them.",
            )
