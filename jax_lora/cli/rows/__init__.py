"""Check, show, convert, or split data before training."""

from __future__ import annotations

import argparse

from jax_lora.cli.rows import check, convert, show, split

HELP = "check, show, convert or split data"
VERBS = {
    "check": check,
    "show": show,
    "convert": convert,
    "split": split,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verbs, each with its own options."""
    verbs = parser.add_subparsers(title="actions", metavar="WHAT", required=True)
    for name, verb in VERBS.items():
        of_verb = verbs.add_parser(name, help=verb.HELP, description=verb.__doc__)
        verb.add_options(of_verb)
        of_verb.set_defaults(act=verb.run)


def run(options: argparse.Namespace) -> int:
    """Do it, and return the exit code."""
    return options.act(options)
