"""Predict classes of texts, or masked tokens, and write them as JSON Lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_lora.cli.adapters import checkpoint_of, merged
from jax_lora.cli.base_model import BaseModel, load_base_of_run
from jax_lora.cli.options import at_least_one
from jax_lora.data.rows import Row, RowFile, read_rows
from jax_lora.errors import ConfigError, DataError, format_error
from jax_lora.finetune.prediction import Fill, fill_masks, predict_classes
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.tasks import CLASSES, MASKED, encode_examples, make_batches

HELP = "predict classes of texts, or masked tokens"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add = parser.add_argument
    add("model_folder", metavar="MODEL", nargs="?", help="Hugging Face folder [the run's]")
    add("--model", metavar="PATH", help="same as MODEL")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", action="append", metavar="TEXT", help="a text; repeatable")
    text = 'file of {"text"} or {"text_a", "text_b"}: .jsonl, .csv, .tsv, ...'
    given.add_argument("--data", metavar="FILE", help=text)
    add("--adapter-path", metavar="DIR", help="run folder or checkpoint [base model only]")
    add("--output", metavar="FILE", help="the new file [standard output]")
    text = "candidates for each masked token [5]"
    add("--top", type=at_least_one, default=5, metavar="N", help=text)
    add("--batch-size", type=at_least_one, default=50, metavar="N", help="texts per batch [50]")


def run(options: argparse.Namespace) -> int:
    """Write the predictions, and return the exit code."""
    file = _file(options)
    checkpoint, settings = None, {}
    if options.adapter_path is not None:
        checkpoint, settings = checkpoint_of(options.adapter_path)
    name = options.model_folder or options.model or settings.get("model")
    if name is None:
        raise ConfigError(
            format_error(
                "predict",
                got="no model",
                expected="a model that classifies texts, or fills masks",
                fix="Give MODEL, or --adapter-path with the folder of a run.",
            )
        )
    base = load_base_of_run(name, settings, "predict", [CLASSES, MASKED])
    variables = base.variables if checkpoint is None else merged(base, checkpoint)
    predict = _classes if base.task == CLASSES else _fills
    lines = (
        json.dumps(each, ensure_ascii=False) + "\n"
        for each in predict(base, variables, file, options)
    )
    if options.output is None:
        sys.stdout.writelines(lines)
    else:
        Path(options.output).write_text("".join(lines), encoding="utf-8")
        print(f"{options.output}: {len(file.rows):,} predictions")
    return 0


def _file(options: argparse.Namespace) -> RowFile:
    if options.data is not None:
        return read_rows(options.data)
    rows = [Row(n, "text", {"text": text}) for n, text in enumerate(options.text, start=1)]
    return RowFile(Path("--text"), tuple(rows), len(rows), 0)


def _classes(
    base: BaseModel, variables: Any, file: RowFile, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the label of each text, its probability, and those of all labels."""
    settings = TrainSettings(max_seq_length=base.model.config.max_position_embeddings)
    # Labels in the file are not needed, and may differ from the model's.
    rows = [Row(row.line, row.kind, row.fields | {"label": None}) for row in file.rows]
    plain = RowFile(file.path, tuple(rows), file.lines, file.blank)
    examples = encode_examples(CLASSES, plain, base.model, base.tokenizer, settings)
    batches = make_batches(CLASSES, examples, base.model, base.tokenizer, options.batch_size)
    labels = base.model.config.labels
    for found in predict_classes(base.model, variables, batches):
        shares = (round(float(p), 6) for p in found.probabilities)
        every = dict(zip(labels, shares, strict=True))
        label = labels[found.number]
        yield {"line": found.line, "label": label, "probability": every[label], "labels": every}


def _fills(
    base: BaseModel, variables: Any, file: RowFile, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the candidates for each mask of each text."""
    mask = base.tokenizer.mask_text
    for row in file.rows:
        text = row.fields.get("text", "")
        if mask not in text:
            raise DataError(
                format_error(
                    f"{file.path}:{row.line}",
                    got="a text without a mask token",
                    expected=f"{mask} instead of each token to predict",
                    fix=f'Write "The capital of France is {mask}.", say.',
                )
            )
        fills = fill_masks(base.model, variables, base.tokenizer, text, top=options.top)
        yield {"line": row.line, "masks": [list(map(_candidate, each)) for each in fills]}


def _candidate(fill: Fill) -> dict[str, Any]:
    return {"text": fill.text, "probability": round(fill.probability, 6)}
