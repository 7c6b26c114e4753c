"""Check, show, convert, or split data before training."""

from __future__ import annotations

import argparse

from jax_lora.cli.options import add_columns_option, add_general_options, add_subcommand
from jax_lora.cli.parser import Parser, listed
from jax_lora.cli.rows import check, convert, show, split

HELP = "check, show, convert or split data"
EXAMPLE = """\
jax-lora data check path/to/data
jax-lora data show path/to/data --rows 2
"""
SUBCOMMANDS = {"check": check, "show": show, "convert": convert, "split": split}


def add_options(parser: Parser) -> None:
    """Add the subcommands with their options."""
    parser.usage = f"{parser.prog} SUBCOMMAND [options]"
    texts = {name: module.HELP for name, module in SUBCOMMANDS.items()}
    parser.description = f"{parser.description}\n\n{listed('subcommands', texts)}"
    parser.set_defaults(run_on_data=parser.show_help)
    subparsers = parser.add_subcommands()
    for name, module in SUBCOMMANDS.items():
        subparser = add_subcommand(subparsers, name, module)
        add_columns_option(subparser.section("data"))
        add_general_options(subparser)
        subparser.set_defaults(run_on_data=module.run)


def run(options: argparse.Namespace) -> int:
    """Run the subcommand, and return the exit code."""
    return options.run_on_data(options)
