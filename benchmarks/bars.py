"""Check the performance targets of the library; the exit status is 1 if one is missed.

Usage:

    python -m benchmarks.bars                # the deterministic targets, on any machine
    python -m benchmarks.bars --rounds 15    # also the timed targets, on an idle machine
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import optax

from benchmarks import catalogue, forms, init_time, measure, report, train_step
from benchmarks.decoder import SIZES

FULL, OURS = "full fine-tuning", "jax_lora (auto)"


@dataclasses.dataclass(frozen=True)
class Limit:
    """A performance target.

    Args:
      what: The measured ratio or value.
      most: The largest acceptable value.
      value: The measured value.
    """

    what: str
    most: float
    value: float

    @property
    def passed(self) -> bool:
        """Whether the target is met."""
        return self.value <= self.most


def main() -> None:
    """Measure, print the table and, with --markdown, update a document."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=0, help="timing rounds; 0: no timing")
    parser.add_argument("--markdown", type=pathlib.Path, help="document to update")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    bars = work() + memory()
    if options.rounds:
        bars += [step_time(options.rounds), *compile_times(options.rounds), making_the_adapter()]
    body = [
        [limit.what, f"{limit.most:.3f}", f"{limit.value:.3f}", "yes" if limit.passed else "NO"]
        for limit in bars
    ]
    table = report.table(["limit", "at most", "measured", "passed"], body)
    text = f"{report.machine()}.\n\n    {report.command('benchmarks.bars')}\n\n{table}"
    print(text)
    if options.markdown:
        report.write_section(options.markdown, "bars", text)
    sys.exit(not all(limit.passed for limit in bars))


def work() -> list[Limit]:
    """Measure the FLOPs and bytes of an unrolled step."""
    figures = _figures(forms.Case(SIZES["384x6"]), catalogue.FACTORED, OURS)
    hand, ours = figures[catalogue.FACTORED], figures[OURS]
    return [
        Limit("matmul FLOPs / hand-written", 0.995, ours.dot_flops / hand.dot_flops),
        Limit("XLA FLOPs / hand-written", 0.995, ours.xla_flops / hand.xla_flops),
        Limit("bytes accessed / hand-written", 0.70, ours.bytes_accessed / hand.bytes_accessed),
    ]


def memory() -> list[Limit]:
    """Measure the memory of steps with the remat policy `dots-no-batch`.

    A scan fixes the order of operations. For unrolled layers, the default scheduler of XLA for CPU
    starts operations early, which dominates memory, so the memory-optimized scheduler is used.
    """
    bars = []
    for scan, layout in ((True, "scanned"), (False, "unrolled, least memory")):
        case = forms.Case(SIZES["384x6"], scan=scan, remat="dots-no-batch")
        figures = _figures(
            case, FULL, OURS, compiler_options=None if scan else measure.LEAST_MEMORY
        )
        ratio = figures[OURS].temp_bytes / figures[FULL].temp_bytes
        bars.append(Limit(f"temp bytes / full, dots-no-batch, {layout}", 0.90, ratio))
    return bars


def _figures(
    case: forms.Case, *rows: str, compiler_options: Mapping[str, Any] | None = None
) -> dict[str, measure.Figures]:
    weights, tx = forms.abstract_weights(case), optax.adamw(1e-4)

    def figures(row: str) -> measure.Figures:
        form = catalogue.ROWS[row](case, weights)
        return measure.figures(form, tx, weights.tokens, compiler_options)[0]

    return {row: figures(row) for row in rows}


def step_time(rounds: int) -> Limit:
    """Time interleaved steps."""
    case = forms.Case(SIZES["384x6"])
    _, seconds = train_step.run(case, [catalogue.FACTORED, OURS], rounds)
    ratio = measure.ratio(seconds[OURS], seconds[catalogue.FACTORED])
    return Limit("step time / hand-written", 0.70, ratio)


def compile_times(rounds: int) -> list[Limit]:
    """Time interleaved tracing, lowering and compiling, in CPU seconds."""
    bars = []
    for layers, scan in ((4, True), (64, True), (64, False)):
        case = forms.Case(dataclasses.replace(SIZES["384x6"], layers=layers), scan=scan)
        weights = forms.abstract_weights(case)
        runs = {
            row: functools.partial(_build_time, catalogue.ROWS[row](case, weights), weights.tokens)
            for row in (catalogue.FACTORED, OURS)
        }
        seconds = measure.interleave(runs, min(rounds, 7) + 1)
        # The first round includes imports.
        ratio = measure.ratio(seconds[OURS][1:], seconds[catalogue.FACTORED][1:])
        layout = "scanned" if scan else "unrolled"
        bars.append(
            Limit(f"trace and compile / hand-written, {layers} layers {layout}", 1.15, ratio)
        )
    return bars


def _build_time(form: forms.Form, tokens: Any) -> float:
    # CPU time of this process varies least on a busy machine.
    return sum(measure.stages(form, optax.adamw(1e-4), tokens, time.process_time).seconds)


def making_the_adapter() -> Limit:
    """Time `lora_init` on 224 kernels, including compilation."""
    make = init_time.maker(scan=False, rank=16)
    jax.clear_caches()
    start = time.perf_counter()
    jax.block_until_ready(make(jax.random.key(1)))
    return Limit("seconds to make a 7B model's adapter, cold", 1.5, time.perf_counter() - start)


if __name__ == "__main__":
    main()
