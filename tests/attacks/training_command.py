"""Run `jax-lora` until it ends or is killed."""

import sys

import grain.experimental  # noqa: F401  so that a fork has it, and what follows
import matplotlib.figure  # noqa: F401
import orbax.checkpoint  # noqa: F401

from jax_lora.cli import main
from jax_lora.cli.main import make_parser

make_parser()  # imports the subcommands


def run_command(report, words):
    """Report what the command prints, and its exit code."""

    class Lines:
        def write(self, text):
            if text.strip():
                report(text.strip())
            return len(text)

        def flush(self):
            pass

    sys.stdout = sys.stderr = Lines()
    report(str(main(words)))
