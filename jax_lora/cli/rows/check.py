"""Check every example of every split, and count tokens and targets."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jax_lora.cli.adapters import templates_of
from jax_lora.cli.base_model import data_folder, model_folder
from jax_lora.cli.names import add_name
from jax_lora.cli.options import add_model_option, add_template_options
from jax_lora.cli.parser import Parser
from jax_lora.data.batches import Batches
from jax_lora.data.data_folder import read_data
from jax_lora.data.examples import Examples, make_examples
from jax_lora.data.formats import unused_fields
from jax_lora.data.packing import speedup
from jax_lora.data.rows import RowFile
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ConfigError

HELP = "check all examples; count tokens, targets and lengths"
EXAMPLE = "jax-lora data check --data path/to/data --model path/to/model"
BARS, WIDEST = 10, 40


def add_options(parser: Parser) -> None:
    """Add the options for the data and for its encoding, which `show` has too."""
    add_name(parser, "--data", "data folder, or one file [bundled]", metavar="PATH")
    add_model_option(parser, "bundled")
    add = parser.section("data").add_argument
    text = "maximum tokens per example [2048]"
    add("--max-seq-length", type=int, default=2048, metavar="N", help=text)
    text = "assistant messages in the loss [all]"
    add("--turns", default="all", choices=("all", "last"), help=text)
    boolean = argparse.BooleanOptionalAction
    text = "exclude prompts from the loss [yes; no for texts]"
    add("--mask-prompt", action=boolean, default=None, help=text)
    add_template_options(parser.section("data"), "the model's")


def run(options: argparse.Namespace) -> int:
    """Print the counts, and return the exit code."""
    data = read_data(data_folder(options.data))
    tokenizer = tokenizer_of(options)
    for name, file in data.splits.items():
        examples = examples_of(file, tokenizer, options)
        lines = [*_file_lines(file), *_token_lines(examples, options.max_seq_length)]
        print("\n".join([f"{name}: {file.path}", *lines, ""]))
    print("No errors found.")
    return 0


def tokenizer_of(options: argparse.Namespace) -> Tokenizer:
    """Load the tokenizer of the options, with the template that they name."""
    templates = templates_of(options, options.model, {}, None)
    return Tokenizer.load(model_folder(options.model), **templates)


def examples_of(file: RowFile, tokenizer: Tokenizer, options: argparse.Namespace) -> Examples:
    """Tokenize the examples of a file as `train` does."""
    return make_examples(
        file,
        tokenizer,
        max_length=options.max_seq_length,
        mask_prompt=options.mask_prompt,
        turns=options.turns,
    )


def _file_lines(file: RowFile) -> list[str]:
    kinds = collections.Counter(row.kind for row in file.rows)
    counts = f"{len(file.rows):,} examples"
    unused = sorted({name for row in file.rows for name in unused_fields(row.fields)})
    counts += f" + {file.blank} blank lines" if file.blank else ""
    counts += f" + {file.skipped} files skipped" if file.skipped else ""
    lines = [f"  {counts}: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}"]
    return [*lines, f"  fields not used: {', '.join(unused)}"] if unused else lines


def _token_lines(examples: Examples, longest: int) -> list[str]:
    lengths = [len(example.ids) for example in examples.rows]
    tokens = sum(lengths)
    targets = sum(example.targets for example in examples.rows)
    padding = Batches.of(examples.rows, 1).padding
    gain = speedup(lengths, round(tokens / (1 - padding)), longest)
    packed = f"; with --pack {gain:.1f}x fewer tokens" if gain > 1.05 else ""
    lines = [
        f"  {tokens:,} tokens, {sum(example.raw for example in examples.rows):,} of them text; "
        f"{targets:,} are targets ({targets / tokens:.0%})",
        f"  {padding:.0%} padding{packed}",
    ]
    notes = [
        (examples.cut, f"truncated at {longest} tokens"),
        (examples.pieces, "are pieces of longer documents"),
        (len(examples.dropped), "dropped, without a target token"),
        (examples.unlocated, "responses without loss: the chat template changes their text"),
    ]
    lines += [f"  {count:,} {note}" for count, note in notes if count]
    return [*lines, *histogram(lengths)]


def histogram(lengths: Sequence[int]) -> list[str]:
    r"""Draw a histogram of sequence lengths: its head, and a line per bar.

    Example:
      >>> print("\n".join(histogram([3, 4, 9])))
             tokens  examples
                3-3         1 ########################################
                4-4         1 ########################################
                9-9         1 ########################################
    """
    low, high = min(lengths), max(lengths)
    edges = np.unique(np.linspace(low, high + 1, BARS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    bars = [
        f"  {f'{a}-{b - 1}':>11} {count:>9,} {'#' * max(1, round(WIDEST * count / counts.max()))}"
        for a, b, count in zip(edges[:-1], edges[1:], counts, strict=True)
        if count
    ]
    return [f"  {'tokens':>11} {'examples':>9}", *bars]


def check_new(path: Path, option: str) -> None:
    """Refuse to overwrite a file or a folder."""
    if path.exists():
        raise ConfigError(
            f"{option} {path}",
            got="an existing path",
            expected="a new name",
            fix="Choose another name, or move the existing file.",
        )
