"""The argument parser of the command: help in sections, as wide as the terminal."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from typing import Any

_WIDE = 110  # columns of a terminal where most options share a line with their text


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help in two columns; on a wide terminal, the first has room for long options."""

    def __init__(self, prog: str, **named: Any):
        """Create a formatter."""
        wide = shutil.get_terminal_size().columns >= _WIDE
        super().__init__(prog, **({"max_help_position": 40 if wide else 24} | named))


class Parser(argparse.ArgumentParser):
    """A parser with sections, and without colors in its help: they would be escaped."""

    def __init__(self, *args: Any, **named: Any):
        """Create a parser."""
        super().__init__(*args, **({"formatter_class": HelpFormatter} | named))
        self.color = False
        self._sections: dict[str, Any] = {}
        self._subcommands: Mapping[str, Parser] = {}

    def section(self, title: str) -> Any:
        """Return the argument group with this title; it is created if necessary."""
        if title not in self._sections:
            self._sections[title] = self.add_argument_group(title)
        return self._sections[title]

    def add_subcommands(self) -> Any:
        """Return an object with `add_parser`; the description lists the subcommands instead."""
        made = self.add_subparsers(prog=self.prog, metavar="SUBCOMMAND", help=argparse.SUPPRESS)
        self._subcommands = made.choices
        return made

    def options_of(self, verb: str) -> list[str]:
        """Return the options of a subcommand, such as "data check"."""
        name, _, rest = verb.partition(" ")
        return self._subcommands[name].options_of(rest) if name else [*self._option_string_actions]

    def show_help(self, _: argparse.Namespace) -> int:
        """Print the help where a subcommand is missing, and return the exit code."""
        self.print_help(sys.stderr)
        return 2


def listed(title: str, texts: Mapping[str, str]) -> str:
    """Format a group of subcommands for a description."""
    return "\n".join([f"{title}:", *(f"  {name:10}{text}" for name, text in texts.items())])
