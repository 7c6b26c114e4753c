"""Hold the library to the bars that it has set itself; fails where one is missed.

For example:

python -m benchmarks.bars                # those that repeat exactly, on any machine
python -m benchmarks.bars --rounds 15    # the times too, on a quiet one
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

FULL, OURS = "full fine-tuning", "ours (auto)"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One promise.

    Args:
      what: What is measured, and against what.
      most: The largest value that keeps the promise.
      value: What was measured.
    """

    what: str
    most: float
    value: float

    @property
    def kept(self) -> bool:
        """Tell whether the promise is kept."""
        return self.value <= self.most


def main() -> None:
    """Measure, print and, if asked, write the section of a document."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=0, help="0: no times")
    parser.add_argument("--markdown", type=pathlib.Path, help="document whose section to rewrite")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    bars = work() + memory()
    if options.rounds:
        bars += [step_time(options.rounds), *compile_times(options.rounds), making_the_adapter()]
    body = [
        [bar.what, f"{bar.most:.3f}", f"{bar.value:.3f}", "yes" if bar.kept else "NO"]
        for bar in bars
    ]
    table = report.table(["bar", "at most", "measured", "kept"], body)
    text = f"{report.machine()}.\n\n    {report.command('benchmarks.bars')}\n\n{table}"
    print(text)
    if options.markdown:
        report.write_section(options.markdown, "bars", text)
    sys.exit(not all(bar.kept for bar in bars))


def work() -> list[Bar]:
    """Measure flops and bytes of an unrolled step."""
    figures = _figures(forms.Case(SIZES["384x6"]), catalogue.FACTORED, OURS)
    hand, ours = figures[catalogue.FACTORED], figures[OURS]
    return [
        Bar("dot flops / by hand", 0.995, ours.dot_flops / hand.dot_flops),
        Bar("XLA flops / by hand", 0.995, ours.xla_flops / hand.xla_flops),
        Bar("bytes accessed / by hand", 0.70, ours.bytes_accessed / hand.bytes_accessed),
    ]


def memory() -> list[Bar]:
    """Measure the memory of steps that save products without batch dimensions.

    A scan forces the order of its operations. Where layers are unrolled, XLA for CPU has to be told
    to keep memory low: in its usual order it runs ahead, and memory measures its scheduler.
    """
    bars = []
    for scan, layout in ((True, "scanned"), (False, "unrolled, least memory")):
        case = forms.Case(SIZES["384x6"], scan=scan, remat="dots-no-batch")
        figures = _figures(
            case, FULL, OURS, compiler_options=None if scan else measure.LEAST_MEMORY
        )
        ratio = figures[OURS].temp_bytes / figures[FULL].temp_bytes
        bars.append(Bar(f"temp bytes / full, dots-no-batch, {layout}", 0.90, ratio))
    return bars


def _figures(
    case: forms.Case, *rows: str, compiler_options: Mapping[str, Any] | None = None
) -> dict[str, measure.Figures]:
    weights, tx = forms.abstract_weights(case), optax.adamw(1e-4)

    def figures(row: str) -> measure.Figures:
        form = catalogue.ROWS[row](case, weights)
        return measure.figures(form, tx, weights.tokens, compiler_options)[0]

    return {row: figures(row) for row in rows}


def step_time(rounds: int) -> Bar:
    """Time steps in turn."""
    case = forms.Case(SIZES["384x6"])
    _, seconds = train_step.run(case, [catalogue.FACTORED, OURS], rounds)
    ratio = measure.ratio(seconds[OURS], seconds[catalogue.FACTORED])
    return Bar("step time / by hand", 0.70, ratio)


def compile_times(rounds: int) -> list[Bar]:
    """Time tracing, lowering and compiling in turn, in CPU seconds."""
    bars = []
    for layers, scan in ((4, True), (64, True), (64, False)):
        case = forms.Case(dataclasses.replace(SIZES["384x6"], layers=layers), scan=scan)
        weights = forms.abstract_weights(case)
        runs = {
            row: functools.partial(_build_time, catalogue.ROWS[row](case, weights), weights.tokens)
            for row in (catalogue.FACTORED, OURS)
        }
        seconds = measure.interleave(runs, min(rounds, 7) + 1)
        # The first round pays for imports.
        ratio = measure.ratio(seconds[OURS][1:], seconds[catalogue.FACTORED][1:])
        layout = "scanned" if scan else "unrolled"
        bars.append(Bar(f"trace and compile / by hand, {layers} layers {layout}", 1.15, ratio))
    return bars


def _build_time(form: forms.Form, tokens: Any) -> float:
    # Of the process's own time: a bar is for any machine, and a busy one changes this least.
    return sum(measure.stages(form, optax.adamw(1e-4), tokens, time.process_time).seconds)


def making_the_adapter() -> Bar:
    """Time `lora_init` on 224 kernels with nothing compiled."""
    make = init_time.maker(scan=False, rank=16)
    jax.clear_caches()
    start = time.perf_counter()
    jax.block_until_ready(make(jax.random.key(1)))
    return Bar("seconds to make a 7B model's adapter, cold", 1.5, time.perf_counter() - start)


if __name__ == "__main__":
    main()
