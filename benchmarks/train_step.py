"""Measure a training step of every implementation, interleaved in one process.

Usage:

    python -m benchmarks.train_step --size 384x6 --rounds 9
    python -m benchmarks.train_step --rows "hand-written LoRA" "jax_lora*" --rounds 0
    python -m benchmarks.train_step --scan --remat dots-no-batch
    python -m benchmarks.train_step --remat dots-no-batch --order least-memory
    python -m benchmarks.train_step --platform gpu --size 1b --dtype bfloat16 --scan
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import pathlib
import statistics
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import catalogue, forms, measure, report
from benchmarks.decoder import REMAT_POLICIES, SIZES

# Peak FLOP/s of dense bfloat16 matmuls, from the data sheets.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}

# Schedulers of XLA for CPU.
ORDERS = {"usual": {}, "least-memory": measure.LEAST_MEMORY}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", choices=list(SIZES), default="384x6")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--scan", action="store_true", help="stack the layers with nn.scan")
    parser.add_argument("--remat", choices=list(REMAT_POLICIES), default="none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--order", choices=list(ORDERS), default="usual", help="scheduler of XLA for CPU"
    )
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="cpu")
    parser.add_argument("--rows", nargs="+", default=["*"], help="names or globs of rows")
    parser.add_argument(
        "--rounds", type=int, default=9, help="timing rounds; 0: deterministic figures only"
    )
    parser.add_argument("--peak-tflops", type=float, help="peak of the device, for its utilization")
    parser.add_argument(
        "--skip-check", action="store_true", help="do not compare losses and gradients"
    )
    parser.add_argument("--markdown", type=pathlib.Path, help="document to update")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table and, with --markdown, update a document."""
    options = arguments()
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(options.platform, options.platform))
    case = forms.Case(
        size=SIZES[options.size], rank=options.rank, scan=options.scan,
        remat=options.remat, dtype=jnp.dtype(options.dtype),
    )  # fmt: skip
    rows, left_out = available(case, chosen(options.rows))
    if not options.skip_check:
        catalogue.check(case, rows)
        say(f"checked: {len(rows)} rows have the same loss and gradients")
    figures, seconds = run(case, rows, options.rounds, ORDERS[options.order])
    peak = options.peak_tflops * 1e12 if options.peak_tflops else None
    peak = peak or PEAK_FLOPS.get(jax.devices()[0].device_kind)
    text = describe(case, options.order, figures, seconds, peak)
    text += "".join(f"\n\nLeft out: {row}: {why}." for row, why in left_out.items())
    print(text)
    if options.markdown:
        report.write_section(options.markdown, section(options), text)


def section(options: argparse.Namespace) -> str:
    """Return the name of the section in the document."""
    layers = "scanned" if options.scan else "unrolled"
    words = ["train_step", options.platform, options.size, options.dtype, layers, options.remat]
    return " ".join([*words, options.order] if ORDERS[options.order] else words)


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def chosen(patterns: list[str]) -> list[str]:
    """Return the rows that match patterns, in the order of the table."""
    for pattern in patterns:
        if not fnmatch.filter(catalogue.ROWS, pattern):
            raise SystemExit(f"no row matches {pattern!r}; rows: {', '.join(catalogue.ROWS)}")
    return [row for row in catalogue.ROWS if any(fnmatch.fnmatch(row, each) for each in patterns)]


def available(case: forms.Case, rows: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the available rows, and the reasons why others are unavailable."""
    weights, left_out = forms.abstract_weights(case), {}
    for row in rows:
        try:
            catalogue.ROWS[row](case, weights)
        except forms.UnavailableError as problem:
            left_out[row] = str(problem)
    return [row for row in rows if row not in left_out], left_out


def run(
    case: forms.Case,
    rows: list[str],
    rounds: int,
    compiler_options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, measure.Figures], dict[str, list[float]]]:
    """Measure the figures of each row, then the interleaved times of all rows."""
    tx = optax.adamw(1e-4)
    shapes = forms.abstract_weights(case)
    figures, compiled = {}, {}
    for row in rows:
        figures[row], compiled[row] = measure.figures(
            catalogue.ROWS[row](case, shapes), tx, shapes.tokens, compiler_options
        )
        say(f"{row}: {figures[row]}")
    if not rounds:
        return figures, {}
    weights = forms.make_weights(case)
    runs = {
        row: measure.Run(compiled[row], catalogue.ROWS[row](case, weights), tx, weights.tokens).step
        for row in rows
    }
    return figures, measure.interleave(runs, rounds)


# -----------------------------------------------------------------------------------------------
# The table
# -----------------------------------------------------------------------------------------------


def describe(
    case: forms.Case,
    order: str,
    figures: dict[str, measure.Figures],
    seconds: dict[str, list[float]],
    peak: float | None,
) -> str:
    """Return the table, after a line that describes the case and the machine."""
    shape = case.size
    layers = "scanned" if case.scan else "unrolled"
    rounds = len(next(iter(seconds.values()), []))
    about = (
        f"{shape.layers} layers ({layers}), width {shape.width}, {shape.tokens:,} tokens, "
        f"{jnp.dtype(case.dtype).name}, rank {case.rank}, remat {case.remat}; "
        + ("in the order of least memory; " if ORDERS[order] else "")
        + report.machine()
        + (f"; medians of {rounds} interleaved rounds." if rounds else ".")
    )
    header = [
        "implementation", "matmul GFLOP", "XLA GFLOP",
        "GB accessed", "temp MB", "residual MB", "argument MB",
    ]  # fmt: skip
    if seconds:
        header += ["trace s", "lower s", "compile s"]
    header += ["step s", "/full", "/hand-written"] * bool(seconds) + ["MFU"] * bool(
        seconds and peak
    )
    body = []
    for row, each in figures.items():
        cells = [
            row, f"{each.dot_flops / 1e9:.2f}", f"{each.xla_flops / 1e9:.2f}",
            f"{each.bytes_accessed / 1e9:.3f}", f"{each.temp_bytes / 1e6:.0f}",
            f"{each.residual_bytes / 1e6:.0f}", f"{each.argument_bytes / 1e6:.0f}",
        ]  # fmt: skip
        if seconds:
            stages = (each.trace_seconds, each.lower_seconds, each.compile_seconds)
            cells += [f"{stage:.2f}" for stage in stages]
            median = statistics.median(seconds[row])
            cells += [f"{median:.3f}", _ratio(seconds, row, "full fine-tuning")]
            cells += [_ratio(seconds, row, catalogue.FACTORED)]
            if peak:
                cells += [f"{_model_flops(case, row) / median / peak:.3f}"]
        body.append(cells)
    return (
        f"{about}\n\n    {report.command('benchmarks.train_step')}\n\n{report.table(header, body)}"
    )


def _ratio(seconds: dict[str, list[float]], row: str, reference: str) -> str:
    if reference not in seconds:
        return ""
    return f"{measure.ratio(seconds[row], seconds[reference]):.2f}"


def _model_flops(case: forms.Case, row: str) -> float:
    """Count the FLOPs that the step needs, without recomputation."""
    plain = dataclasses.replace(case, remat="none")
    weights = forms.abstract_weights(plain)
    needed = row if row.startswith("full") else catalogue.FACTORED
    form = catalogue.ROWS[needed](plain, weights)
    step = measure.make_step(form, optax.adamw(1e-4))
    state = jax.eval_shape(optax.adamw(1e-4).init, form.trainable)
    return measure.dot_flops(
        jax.make_jaxpr(step)(form.trainable, state, form.frozen, weights.tokens)
    )


if __name__ == "__main__":
    main()
