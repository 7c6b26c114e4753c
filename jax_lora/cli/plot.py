"""Plot the loss curves of one or more runs, as a PNG file or as text."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from jax_lora.errors import ConfigError, format_error
from jax_lora.report.curves import read_curves

HELP = "plot the loss curves of runs"
EXAMPLE = """\
jax-lora plot adapters adapters.1 --output loss.png
jax-lora plot adapters --text --log-y
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="run folder, or its metrics.jsonl")
    add("-o", "--output", metavar="FILE", help=".png file to write [loss.png]")
    add("--text", action="store_true", help="plot in the terminal")
    add("--log-y", action="store_true", help="logarithmic loss axis")


def run(options: argparse.Namespace) -> int:
    """Plot, and return the exit code."""
    curves = [read_curves(each) for each in options.runs]
    if options.text:
        from jax_lora.report.text_plot import text_plot

        width = shutil.get_terminal_size().columns
        print("\n".join(text_plot(curves, width, log=options.log_y)))
        return 0
    from jax_lora.report.loss_plot import write_plot

    target = Path(options.output or "loss.png")
    if target.suffix != ".png":
        raise ConfigError(
            format_error(
                f"--output {target}",
                got=f"the extension {target.suffix!r}",
                expected="the extension .png",
                fix=f"Use -o {target.with_suffix('.png')}.",
            )
        )
    write_plot(curves, target, log=options.log_y)
    print(target)
    return 0
