"""The long run: `python -m tests.properties.run --programs 20000 --seed 0`.

Programs have numbers, so that a run can be cut into ranges and any one program drawn again:
`--start 310 --programs 1` runs program 310 alone and prints it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import multiprocessing
import sys
import time
from typing import Any

import tests.conftest  # isort: skip  # noqa: F401 - strict promotion and the CPU, as in every test
import jax

from jax_lora.transform.strategies import FORMS, MATERIALIZED
from tests.properties.judge import Verdict, judge
from tests.properties.programs import Program
from tests.properties.shrink import shrink
from tests.properties.steps import draw_program

CHUNK = 50


@dataclasses.dataclass
class Tally:
    """What came of some programs."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rules: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    sites: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    formed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, program: Program, verdict: Verdict) -> None:
        """Count one program."""
        self.counts["programs"] += 1
        self.counts[f"form {program.form}"] += 1
        self.counts[f"precision {program.precision}"] += 1
        self.counts[f"outside {program.outer}"] += 1
        self.counts["axes from find_kernels"] += program.found
        self.counts["refused by JAX itself"] += verdict.skipped
        formed = [site.operation for site in verdict.sites if site.form == MATERIALIZED]
        self.counts["right until XLA joins operations"] += verdict.miscompiled
        self.counts["no weight formed"] += not formed
        self.counts["adapter has no bearing"] += not verdict.moved
        self.rules.update(verdict.rules)
        self.sites.update(site.form for site in verdict.sites)
        self.sites["sharing their data"] += sum(bool(site.beside) for site in verdict.sites)
        self.formed.update(formed)

    def merge(self, other: Tally) -> None:
        """Add the counts of other programs."""
        self.counts.update(other.counts)
        self.rules.update(other.rules)
        self.sites.update(other.sites)
        self.formed.update(other.formed)
        self.failures += other.failures


def report(program: Program, verdict: Verdict) -> str:
    """Write a counterexample down so that it can be pasted into a test."""
    kernels = "".join(f"    {name!r}: {spec},\n" for name, spec in program.kernels.items())
    about = f"precision={program.precision!r}, outer={program.outer!r}, form={program.form!r}"
    return (
        f"program {program.name}: {verdict.failure}\n{about}\nkernels = {{\n{kernels}}}\n"
        f"inputs = {dict(program.inputs)}\n\n{program.source()}"
    )


def run_range(seed: int, start: int, stop: int, shrinking: bool) -> Tally:
    """Judge the programs of these numbers."""
    tally = Tally()
    for index in range(start, stop):
        program = draw_program(seed, index, FORMS)
        try:
            verdict = judge(program)
        except Exception as error:  # of find_kernels, or of a program that makes no sense
            verdict = Verdict(f"no verdict: {type(error).__name__}: {error}", "no verdict")
        tally.add(program, verdict)
        if verdict.failure is not None:
            if shrinking and verdict.kind != "no verdict":
                program = program.with_axes_found() if program.found else program
                program = shrink(program, lambda other, kind=verdict.kind: _same(other, kind))
                verdict = judge(program)
            tally.failures.append(report(program, verdict))
    jax.clear_caches()  # no two programs share anything
    return tally


def _same(program: Program, kind: str | None) -> bool:
    try:
        return judge(program).kind == kind
    except Exception:  # what is left makes no sense as a program
        return False


def summary(tally: Tally, seconds: float) -> str:
    """Write the whole run down."""
    rows = [f"{name}: {count}" for name, count in sorted(tally.counts.items())]
    listed = lambda counts: ", ".join(f"{k} {v}" for k, v in counts.most_common())  # noqa: E731
    return "\n".join(
        [
            *rows,
            f"contractions and formed weights: {listed(tally.sites)}",
            f"rules applied: {sum(tally.rules.values())} ({listed(tally.rules)})",
            f"weights formed: {sum(tally.formed.values())} ({listed(tally.formed)})",
            f"failures: {len(tally.failures)}",
            f"seconds: {seconds:.0f}",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a range of programs, print every counterexample and a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--no-shrink", dest="shrink", action="store_false")
    options = parser.parse_args(argv)
    began, tally, stop = time.monotonic(), Tally(), options.start + options.programs
    ranges = [
        (options.seed, start, min(start + CHUNK, stop), options.shrink)
        for start in range(options.start, stop, CHUNK)
    ]
    print(f"jax {jax.__version__}, seed {options.seed}, programs {options.start} to {stop - 1}")
    for each in _run_all(ranges, options.jobs):
        tally.merge(each)
        for failure in each.failures:
            print(f"\n{failure}")
        done = tally.counts["programs"]
        print(
            f"{done} programs, {len(tally.failures)} failures, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    print(f"\n{summary(tally, time.monotonic() - began)}")
    return 1 if tally.failures else 0


def _run_all(ranges: list[Any], jobs: int) -> Any:
    if jobs == 1:
        yield from (run_range(*each) for each in ranges)
        return
    # Processes are replaced now and then, as the caches of compiled programs never shrink.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=10) as pool:
        yield from pool.imap(_run_one, ranges)


def _run_one(arguments: tuple[Any, ...]) -> Tally:
    return run_range(*arguments)


if __name__ == "__main__":
    sys.exit(main())
