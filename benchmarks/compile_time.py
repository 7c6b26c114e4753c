"""Measure the time to trace, lower and compile a training step, relative to hand-written LoRA.

Usage:

    python -m benchmarks.compile_time
    python -m benchmarks.compile_time --layers 16 --layouts unrolled --rows "jax_lora (auto)"
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import optax

from benchmarks import catalogue, forms, measure, report
from benchmarks.decoder import SIZES

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STAGES = ("trace", "lower", "compile", "total")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--size", choices=list(SIZES), default="384x6", help="model size, except its layers"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 64])
    parser.add_argument(
        "--layouts", nargs="+", choices=("scanned", "unrolled"), default=["scanned", "unrolled"]
    )
    parser.add_argument(
        "--rows", nargs="+", choices=list(catalogue.ROWS), default=["jax_lora (auto)"]
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: CPU time of all threads, for busy machines",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=pathlib.Path, help="document to update")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table and, with --markdown, update a document."""
    options = arguments()
    jax.config.update("jax_platforms", "cpu")
    rows = [catalogue.FACTORED, *(row for row in options.rows if row != catalogue.FACTORED)]
    body = []
    for layout in options.layouts:
        for layers in options.layers:
            size = dataclasses.replace(SIZES[options.size], layers=layers)
            case = forms.Case(size, scan=layout == "scanned")
            name = f"{layers} layers, {layout}"
            body += compare(name, case, rows, options.rounds, CLOCKS[options.clock])
    header = ["model", "implementation", *(f"{stage} s" for stage in STAGES)]
    header += [f"{stage} / hand-written" for stage in STAGES]
    about = (
        f"Width {SIZES[options.size].width}, a complete training step from shapes; "
        f"{report.machine()}; {options.clock} time, medians of {options.rounds} interleaved rounds."
    )
    command = report.command("benchmarks.compile_time")
    text = f"{about}\n\n    {command}\n\n{report.table(header, body)}"
    print(text)
    if options.markdown:
        report.write_section(options.markdown, "compile_time", text)


def compare(
    name: str, case: forms.Case, rows: list[str], rounds: int, clock: Callable[[], float]
) -> list[list[str]]:
    """Measure the stages of all rows, interleaved; return the rows of the table."""
    weights, tx = forms.abstract_weights(case), optax.adamw(1e-4)
    built = {row: catalogue.ROWS[row](case, weights) for row in rows}
    seconds: dict[str, dict[str, list[float]]] = {row: {s: [] for s in STAGES} for row in rows}
    for turn in range(rounds + 1):
        for row in rows:
            stages = measure.stages(built[row], tx, weights.tokens, clock).seconds
            if turn:  # the first round includes imports
                for stage, each in zip(STAGES, (*stages, sum(stages)), strict=True):
                    seconds[row][stage].append(each)
        print(f"{name}: round {turn} of {rounds}", file=sys.stderr, flush=True)
    reference = seconds[catalogue.FACTORED]
    return [
        [
            name, row,
            *(f"{statistics.median(seconds[row][s]):.2f}" for s in STAGES),
            *(f"{measure.ratio(seconds[row][s], reference[s]):.2f}" for s in STAGES),
        ]
        for row in rows
    ]  # fmt: skip


if __name__ == "__main__":
    main()
