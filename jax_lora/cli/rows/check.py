"""Check every example of every split, and count tokens and targets."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jax_lora.cli.base_model import data_folder, model_folder
from jax_lora.data.batches import Batches
from jax_lora.data.data_folder import read_data
from jax_lora.data.examples import Examples, make_examples
from jax_lora.data.packing import speedup
from jax_lora.data.rows import RowFile
from jax_lora.data.tokenizer import Tokenizer

HELP = "check all examples; count tokens, targets and lengths"
BARS, WIDEST = 10, 40


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which rows, and how a model reads them."""
    add = parser.add_argument
    add("data", metavar="PATH", nargs="?", help="data folder or file [bundled]")
    add("--model", metavar="PATH", help="folder with the tokenizer [bundled]")
    add(
        "--max-seq-length",
        type=int,
        default=2048,
        metavar="N",
        help="tokens of an example [2048]",
    )
    text = "assistant messages in the loss [all]"
    add("--turns", default="all", choices=("all", "last"), help=text)
    boolean = argparse.BooleanOptionalAction
    text = "exclude prompts from the loss [yes; no for texts]"
    add("--mask-prompt", action=boolean, default=None, help=text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_data_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the counts, and return the exit code."""
    data = read_data(data_folder(options.data))
    tokenizer = Tokenizer.load(model_folder(options.model))
    for name, file in data.splits.items():
        print("\n".join([f"{name}: {file.path}", *_of_file(file)]))
        print("\n".join(_of_tokens(examples_of(file, tokenizer, options), options.max_seq_length)))
        print()
    print("All rows can be used.")
    return 0


def examples_of(file: RowFile, tokenizer: Tokenizer, options: argparse.Namespace) -> Examples:
    """Encode rows as training would."""
    return make_examples(
        file,
        tokenizer,
        max_length=options.max_seq_length,
        mask_prompt=options.mask_prompt,
        turns=options.turns,
    )


def _of_file(file: RowFile) -> list[str]:
    kinds = collections.Counter(row.kind for row in file.rows)
    counts = f"{len(file.rows):,} rows"
    counts += f" + {file.blank} blank lines" if file.blank else ""
    counts += f" + {file.skipped} files skipped" if file.skipped else ""
    return [f"  {counts}: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}"]


def _of_tokens(examples: Examples, longest: int) -> list[str]:
    lengths = [len(example.ids) for example in examples.rows]
    tokens = sum(lengths)
    learned = sum(int(example.loss_mask[1:].sum()) for example in examples.rows)
    padding = Batches.of(examples.rows, 1).padding
    lines = [
        f"  {tokens:,} tokens, {sum(example.raw for example in examples.rows):,} of them text; "
        f"{learned:,} are learned ({learned / tokens:.0%})",
        f"  {padding:.0%} padding in a few lengths{_gain(lengths, padding, longest)}",
    ]
    lost = [
        (examples.cut, f"are cut at {longest} tokens"),
        (examples.pieces, "are pieces of longer documents"),
        (len(examples.dropped), "have nothing to learn and are left out"),
        (examples.unlocated, "answers are written differently by the template and not learned"),
    ]
    lines += [f"  {count:,} {what}" for count, what in lost if count]
    return [*lines, *histogram(lengths)]


def _gain(lengths: Sequence[int], padding: float, longest: int) -> str:
    gain = speedup(lengths, round(sum(lengths) / (1 - padding)), longest)
    return f"; with --pack {gain:.1f}x fewer tokens" if gain > 1.05 else ""


def histogram(lengths: Sequence[int]) -> list[str]:
    r"""Draw how many rows have which length.

    Args:
      lengths: Tokens of each row.

    Returns:
      A line a bar.

    Example:
      >>> print("\n".join(histogram([3, 4, 9])))
             tokens   rows
                3-3      1 ########################################
                4-4      1 ########################################
                9-9      1 ########################################
    """
    low, high = min(lengths), max(lengths)
    edges = np.unique(np.linspace(low, high + 1, BARS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    bars = [
        f"  {f'{a}-{b - 1}':>11} {count:>6,} {'#' * max(1, round(WIDEST * count / counts.max()))}"
        for a, b, count in zip(edges[:-1], edges[1:], counts, strict=True)
        if count
    ]
    return [f"  {'tokens':>11} {'rows':>6}", *bars]


def check_new(path: Path, option: str) -> None:
    """Refuse to write over a file or into a folder that is there."""
    from jax_lora.errors import ConfigError, format_error

    if path.exists():
        raise ConfigError(
            format_error(
                f"{option} {path}",
                got="something of that name",
                expected="a new name",
                fix="Give another, or move it away.",
            )
        )
