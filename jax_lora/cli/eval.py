"""Evaluate an adapter on the test split: loss, and the metrics of the task."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax_lora.cli.adapters import faster, find_checkpoint_and_config, merge_checkpoint, templates_of
from jax_lora.cli.base_model import BUNDLED, data_folder, load_base_of_run
from jax_lora.cli.names import add_name
from jax_lora.cli.options import (
    ADAPTER_HELP,
    add_columns_option,
    add_model_option,
    add_template_options,
    at_least_one,
)
from jax_lora.cli.parser import Parser
from jax_lora.data.columns import renaming
from jax_lora.data.data_folder import read_data
from jax_lora.errors import DataError
from jax_lora.finetune.devices import AUTO, make_mesh, mesh_sizes
from jax_lora.finetune.evaluation import ALL, Evaluation, Score
from jax_lora.finetune.tasks import CAUSAL, CLASSES, SEQ2SEQ, longest_input
from jax_lora.models.mesh_sharding import ROW_AXES
from jax_lora.report.progress_bar import progress_bar
from jax_lora.storage.atomic_writes import write_file

HELP = "evaluate an adapter: loss, exact match, accuracy, F1"
EXAMPLE = """\
jax-lora eval --compare-base
jax-lora eval --adapter-path run --split valid --save-path scores.json
"""
LONGEST = 4096  # maximum sequence length of a model without a limit
ROWS = 50  # examples per batch

# Heading, attribute of a score, and format; a column is left out where a score has no value.
MEASURES = (
    ("loss", "loss", ".4f"),
    ("perplexity", "perplexity", ",.4g"),
    ("exact match", "exact", ".1%"),
    ("accuracy", "accuracy", ".1%"),
    ("F1", "f1", ".3f"),
    ("execution match", "execution", ".1%"),
)


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    add_model_option(parser, "from the run")
    add_name(parser, "--data", "data folder, or one file [from the run]", metavar="PATH")
    text = f"{ADAPTER_HELP} [adapters]"
    add_name(parser, "--adapter-path", text, default="adapters", metavar="DIR")
    text = "JSON file of the scores to write, besides the table [none]"
    add_name(parser, "--save-path", text, metavar="FILE")
    section = parser.section("evaluation")
    add = section.add_argument
    add("--compare-base", action="store_true", help="evaluate the base model too")
    add("--split", default="test", choices=("train", "valid", "test"), help="the split [test]")
    add("--limit", type=at_least_one, metavar="N", help="evaluate the first N examples [all]")
    text = "maximum number of completion tokens [64]"
    add("--max-tokens", type=at_least_one, default=64, metavar="N", help=text)
    text = "examples per batch [50, or the next multiple for the mesh]"
    add("--batch-size", type=at_least_one, metavar="N", help=text)
    text = "shard over devices, as in data=2,fsdp=4,tensor=1,expert=1 [auto]"
    add("--mesh", default=AUTO, metavar="SIZES", help=text)
    add_columns_option(section)
    add_template_options(section)


def run(options: argparse.Namespace) -> int:
    """Evaluate, print the table, and return the exit code."""
    began = time.perf_counter()
    checkpoint, settings = find_checkpoint_and_config(options.adapter_path)
    with renaming(options.columns or settings.get("columns")):
        data = read_data(data_folder(options.data or settings.get("data", BUNDLED)))
    file = data.split(options.split)
    file = dataclasses.replace(file, rows=file.rows[: options.limit])
    name = options.model or settings.get("model", BUNDLED)
    rows = _rows(options)
    mesh = make_mesh(options.mesh, rows)
    templates = templates_of(options, name, settings, checkpoint)
    shown = "auto" if options.save_path is None else "none"  # for a program, not for people
    base = load_base_of_run(name, settings, templates=templates, mesh=mesh, progress=shown)
    evaluation = Evaluation(
        file,
        base.tokenizer,
        task=base.task,
        max_length=min(longest_input(base.model), LONGEST),
        max_tokens=options.max_tokens,
        rows=rows,
        mesh=mesh,
    )
    models = {"base": faster(base.variables)} if options.compare_base else {}
    models["adapter"] = merge_checkpoint(base, checkpoint, donate=not options.compare_base)
    columns = {}
    for column, variables in models.items():
        with progress_bar(f"Evaluating {column}, {len(file.rows)} examples", shown) as advance:
            columns[column] = evaluation.score(base.model, variables, advance=advance)
    width = shutil.get_terminal_size((1000, 24)).columns
    title = f"{file.path}, model {base.name}, adapter {checkpoint}"
    print(title if len(title) <= width else title.replace(", ", "\n"))
    print("\n".join(table(columns, width)))
    total = columns["adapter"][ALL]
    unit = "labels" if base.task == CLASSES else "target tokens"
    seconds = time.perf_counter() - began
    print(f"{total.rows} examples, {total.tokens:,} {unit}, in {seconds:.1f} s")
    if total.exact is None and base.task in (CAUSAL, SEQ2SEQ):
        print("Exact match needs prompts with completions; these examples have none.")
    if options.save_path:
        _write(Path(options.save_path), columns)
    return 0


def _rows(options: argparse.Namespace) -> int:
    """Return the examples per batch; the default is rounded up to a multiple for the mesh."""
    if options.batch_size is not None or options.mesh == AUTO:
        return options.batch_size or ROWS
    sizes = mesh_sizes(options.mesh)
    split = math.prod(sizes.get(name, 1) for name in ROW_AXES)
    return -(-ROWS // split) * split


def _write(file: Path, columns: Mapping[str, Mapping[str, Score]]) -> None:
    values = {
        model: {
            group: dataclasses.asdict(score) | {"perplexity": score.perplexity}
            for group, score in scores.items()
        }
        for model, scores in columns.items()
    }
    write_file(file, json.dumps(values, indent=2) + "\n", DataError)


def table(columns: Mapping[str, Mapping[str, Score]], width: int = 80) -> list[str]:
    r"""Format scores as a table with the models side by side.

    Args:
      columns: Scores by group, by model.
      width: Columns of the screen. If the models do not fit side by side, they are below each
        other, and headings have two lines.

    Example:
      >>> score = Score(rows=2, tokens=9, loss=0.5, exact=1.0)
      >>> print("\n".join(table({"base": {"all": score}, "adapter": {"all": score}})))
           rows             loss      perplexity      exact match
                   base  adapter   base  adapter    base  adapter
      all     2  0.5000   0.5000  1.649    1.649  100.0%   100.0%
    """
    groups = next(iter(columns.values()))
    shown = [
        measure
        for measure in MEASURES
        if all(getattr(score, measure[1]) is not None for score in groups.values())
    ]
    grid = [["", "rows"], ["", ""], *([group, str(of.rows)] for group, of in groups.items())]
    for head, attribute, form in shown:
        for place, (model, scores) in enumerate(columns.items()):
            last = place == len(columns) - 1
            grid[0].append(head if last else "")
            grid[1].append(model)
            for line, group in zip(grid[2:], groups, strict=True):
                line.append(format(getattr(scores[group], attribute), form))
    lines = _aligned(grid, len(columns))
    return lines if max(map(len, lines)) <= width else _narrow(columns, shown)


def _narrow(
    columns: Mapping[str, Mapping[str, Score]], shown: Sequence[tuple[str, str, str]]
) -> list[str]:
    """Format scores with the models of a group below each other."""
    words = [head.rpartition(" ") for head in ("rows", *(head for head, *_ in shown))]
    grid = [["", "", *(top for top, _, _ in words)], ["", "", *(word for _, _, word in words)]]
    for group in next(iter(columns.values())):
        for place, (model, scores) in enumerate(columns.items()):
            score = scores[group]
            cells = (format(getattr(score, name), form) for _, name, form in shown)
            grid.append(["" if place else group, model, str(score.rows), *cells])
    return _padded(grid, [max(map(len, column)) for column in zip(*grid, strict=True)], names=2)


def _aligned(grid: list[list[str]], models: int) -> list[str]:
    """Pad the cells; a heading spans the columns of all models."""
    widths = [max(len(line[column]) for line in grid[1:]) for column in range(len(grid[0]))]
    widths[1] = max(widths[1], len("rows"))
    heads = f"{'':{widths[0]}}  {'rows':>{widths[1]}}"
    for last in range(1 + models, len(widths), models):
        room = sum(widths[last - models + 1 : last + 1]) + 2 * (models - 1)
        missing = max(0, len(grid[0][last]) - room)
        widths[last] += missing
        heads += "  " + grid[0][last].rjust(room + missing)
    return [heads, *_padded(grid[1:], widths, names=1)]


def _padded(grid: list[list[str]], widths: list[int], names: int) -> list[str]:
    """Pad the cells to the widths: those of the first columns, `names`, on the right."""
    return [
        "  ".join(
            cell.ljust(width) if place < names else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in grid
    ]
