"""Plot the loss curves of one or more runs, as a PNG file or as text."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from jax_lora.cli.names import add_name
from jax_lora.cli.parser import Parser
from jax_lora.errors import ConfigError
from jax_lora.report.curves import read_curves

HELP = "plot the loss curves of runs"
EXAMPLE = """\
jax-lora plot --adapter-path adapters adapters.1 --save-path loss.png
jax-lora plot adapters --text --log-y
"""


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    text = "run folders, or their metrics.jsonl (required)"
    add_name(parser, "--adapter-path", text, metavar="RUN", nargs="+", required=True)
    add_name(parser, "--save-path", ".png file to write [loss.png]", metavar="FILE")
    add = parser.section("plot").add_argument
    add("--text", action="store_true", help="plot in the terminal")
    add("--log-y", action="store_true", help="logarithmic loss axis")


def run(options: argparse.Namespace) -> int:
    """Plot, and return the exit code."""
    curves = [read_curves(each) for each in options.adapter_path]
    if options.text:
        from jax_lora.report.text_plot import text_plot

        width = shutil.get_terminal_size().columns
        print("\n".join(text_plot(curves, width, log=options.log_y)))
        return 0
    from jax_lora.report.loss_plot import write_plot

    target = Path(options.save_path or "loss.png")
    if target.suffix != ".png":
        raise ConfigError(
            f"--save-path {target}",
            got=f"the extension {target.suffix!r}",
            expected="the extension .png",
            fix=f"Use --save-path {target.with_suffix('.png')}.",
        )
    write_plot(curves, target, log=options.log_y)
    print(target)
    return 0
