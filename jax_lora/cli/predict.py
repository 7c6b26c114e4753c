"""Predict classes of texts, or masked tokens, and write them as JSON Lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_lora.cli.adapters import load_for_inference
from jax_lora.cli.base_model import BaseModel
from jax_lora.cli.generate import add_inference_options
from jax_lora.cli.names import PLACES_TITLE, add_name
from jax_lora.cli.options import add_columns_option, at_least_one
from jax_lora.cli.parser import Parser
from jax_lora.data.encoder_examples import texts_of
from jax_lora.data.encoder_tokenizer import EncodedText
from jax_lora.data.rows import Row, RowFile, read_rows
from jax_lora.errors import ConfigError, DataError
from jax_lora.finetune.prediction import Candidate, fill_masks, predict_classes
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.tasks import CLASSES, MASKED, encode_examples, longest_input, make_batches
from jax_lora.storage.atomic_writes import write_file

HELP = "predict classes of texts, or masked tokens"
EXAMPLE = """\
jax-lora predict --adapter-path adapters --text "a very good film"
jax-lora predict bert --text "The capital of France is [MASK]." --top 3
"""
_TOP = 5


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    add_inference_options(parser, "from the run")
    given = parser.section(PLACES_TITLE).add_mutually_exclusive_group(required=True)
    text = 'file of {"text"} or {"text_a", "text_b"}: .jsonl, .csv, .tsv, ... (or --text)'
    add_name(parser, "--data", text, metavar="FILE", into=given)
    text = "a text; repeatable (or --data)"
    given.add_argument("--text", action="append", metavar="TEXT", help=text)
    add_name(parser, "--save-path", "file to write [standard output]", metavar="FILE")
    section = parser.section("predictions")
    add = section.add_argument
    text = f"candidates for each masked token [{_TOP}]"
    add("--top", type=at_least_one, metavar="N", help=text)
    add("--batch-size", type=at_least_one, default=50, metavar="N", help="texts per batch [50]")
    add_columns_option(section)


def run(options: argparse.Namespace) -> int:
    """Write the predictions, and return the exit code."""
    file = _file(options)
    base, variables, _ = load_for_inference(options, "predict", [CLASSES, MASKED], default=None)
    predict = _classes if base.task == CLASSES else _fills
    ascii_only = options.save_path is None  # the screen would escape in a way that is not JSON
    lines = (
        json.dumps(each, ensure_ascii=ascii_only) + "\n"
        for each in predict(base, variables, file, options)
    )
    if options.save_path is None:
        sys.stdout.writelines(lines)
    else:
        write_file(Path(options.save_path), "".join(lines), DataError)
        print(f"{options.save_path}: {len(file.rows):,} predictions")
    return 0


def _file(options: argparse.Namespace) -> RowFile:
    if options.data is not None:
        return read_rows(options.data)
    rows = [Row(n, "text", {"text": text}) for n, text in enumerate(options.text, start=1)]
    return RowFile(Path("--text"), tuple(rows), len(rows), 0)


def _classes(
    base: BaseModel, variables: Any, file: RowFile, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the label of each text, its probability, and the probabilities of all labels."""
    if options.top is not None:
        raise ConfigError(
            f"--top {options.top}",
            got=f"{base.name}, a model for {CLASSES}",
            expected=f"a model for {MASKED}",
            fix="Remove --top: the output has the probabilities of all labels.",
        )
    settings = TrainSettings(max_seq_length=base.model.config.max_position_embeddings)
    # Labels in the file are not needed, and may differ from the model's.
    rows = [Row(row.line, row.kind, row.fields | {"label": None}) for row in file.rows]
    plain = RowFile(file.path, tuple(rows), file.lines, file.blank)
    examples = encode_examples(CLASSES, plain, base.model, base.tokenizer, settings)
    batches = make_batches(CLASSES, examples, base.model, base.tokenizer, options.batch_size)
    labels = base.model.config.labels
    for prediction in predict_classes(base.model, variables, batches):
        rounded = (round(float(p), 6) for p in prediction.probabilities)
        probabilities = dict(zip(labels, rounded, strict=True))
        label = labels[prediction.number]
        yield {
            "line": prediction.line,
            "label": label,
            "probability": probabilities[label],
            "labels": probabilities,
        }


def _fills(
    base: BaseModel, variables: Any, file: RowFile, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the candidates for each mask token of each text."""
    texts = [_masked(base, file, row) for row in file.rows]
    top, size = options.top or _TOP, options.batch_size
    fills = fill_masks(base.model, variables, base.tokenizer, texts, top=top, rows=size)
    for row, masks in zip(file.rows, fills, strict=True):
        yield {"line": row.line, "masks": [list(map(_as_dict, mask)) for mask in masks]}


def _masked(base: BaseModel, file: RowFile, row: Row) -> EncodedText:
    """Tokenize a text, or a pair of texts, and refuse it without a mask token."""
    most, mask = longest_input(base.model), base.tokenizer.mask_text
    encoded = base.tokenizer.encode(*texts_of(file, row), max_length=most)
    if base.tokenizer.mask_id not in encoded.ids:
        raise DataError(
            f"{file.path}:{row.line}",
            got=f"no mask token in the first {most} tokens"
            if encoded.cut
            else "a text without a mask token",
            expected=f"{mask} instead of each token to predict",
            fix=f'Write, for example, "The capital of France is {mask}."',
        )
    return encoded


def _as_dict(candidate: Candidate) -> dict[str, Any]:
    return {"text": candidate.text, "probability": round(candidate.probability, 6)}
