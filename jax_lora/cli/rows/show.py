"""Show examples as the model reads them, with the target tokens in color."""

from __future__ import annotations

import argparse
import itertools
import os
import sys

from jax_lora.cli.base_model import data_folder
from jax_lora.cli.options import at_least_one
from jax_lora.cli.parser import Parser
from jax_lora.cli.rows.check import add_options as add_data_options
from jax_lora.cli.rows.check import examples_of, tokenizer_of
from jax_lora.data.data_folder import read_data
from jax_lora.data.examples import Example
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.printable import PROSE, printable
from jax_lora.report.screen import unscreened

HELP = "show examples as the model reads them, with their targets"
EXAMPLE = "jax-lora data show --data path/to/data --model path/to/model --rows 5 --tokens"
GREEN, DIM, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    add_data_options(parser)
    add = parser.section("examples shown").add_argument
    add("-n", "--rows", type=at_least_one, default=3, metavar="N", help="number of examples [3]")
    add("--split", default="train", choices=("train", "valid", "test"), help="the split [train]")
    add("--tokens", action="store_true", help="mark the end of every token")


def run(options: argparse.Namespace) -> int:
    """Print the examples, and return the exit code."""
    file = read_data(data_folder(options.data)).split(options.split)
    tokenizer = tokenizer_of(options)
    examples = examples_of(file, tokenizer, options)
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"{'green' if colored else '[[ ]]'}: target tokens; the rest is context")
    for example in examples.rows[: options.rows]:
        counts = f"{example.tokens} tokens, {example.targets} targets"
        print(f"\n{file.path}:{example.line}: {counts}")
        text = shown(example, tokenizer, colored=colored, tokens=options.tokens)
        print(text, file=unscreened(sys.stdout))
    return 0


def shown(example: Example, tokenizer: Tokenizer, *, colored: bool, tokens: bool = False) -> str:
    """Return the text of an example, with its targets marked by color or by brackets.

    Special tokens are shown, control characters are escaped, and `tokens` marks the end of each.
    """
    text = []
    marks = [False, *example.loss_mask[1:].tolist()]  # the first token is never a target
    for is_target, run in itertools.groupby(
        zip(marks, example.ids.tolist(), strict=True), key=lambda pair: pair[0]
    ):
        ids = [index for _, index in run]
        pieces = [[index] for index in ids] if tokens else [ids]
        words = "|".join(printable(tokenizer.decode_all(piece), keep=PROSE) for piece in pieces)
        if colored:
            text.append(f"{GREEN if is_target else DIM}{words}{PLAIN}")
        else:
            text.append(f"[[{words}]]" if is_target else words)
    return ("|" if tokens else "").join(text)
