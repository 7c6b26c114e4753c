"""Measure how long it takes to make the adapter of a model of 7B parameters.

For example:

python -m benchmarks.init_time

The base is there as shapes only. The first call of a process compiles what it needs; the second
finds it compiled.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jax_lora as jl
from benchmarks import forms, report
from benchmarks.decoder import Size

SEVEN_B = Size(32, 4096, 11008, 32, 32, 32000, 1, 8)

# jax.monitoring reports each program that XLA compiles under this name.
_COMPILED = "/jax/core/compile/backend_compile_duration"


def main() -> None:
    """Measure, print and, if asked, write the section of a document."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--markdown", type=pathlib.Path, help="document whose section to rewrite")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    programs: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            programs.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    body = [
        line
        for name, scan in (("32 layers, scanned", True), ("32 layers, unrolled", False))
        for line in measure(name, scan, options.rank, programs)
    ]
    header = ["model", "pairs", "call", "seconds", "programs", "longest compile s"]
    about = f"A decoder of 7B parameters, rank {options.rank}; {report.machine()}."
    command = report.command("benchmarks.init_time")
    text = f"{about}\n\n    {command}\n\n{report.table(header, body)}"
    print(text)
    if options.markdown:
        report.write_section(options.markdown, "init_time", text)


def maker(scan: bool, rank: int) -> Callable[[jax.Array], jl.Adapter]:
    """Return what makes the adapter of a 7B decoder from a key."""
    case = forms.Case(SEVEN_B, rank=rank, scan=scan, dtype=jnp.dtype("bfloat16"))
    weights = forms.abstract_weights(case)
    kernels = jl.find_kernels(case.decoder().apply, weights.base, weights.tokens)
    config = jl.LoraConfig(rank=rank)
    return lambda key: jl.lora_init(key, weights.base, config, kernels=kernels)


def measure(name: str, scan: bool, rank: int, programs: list[float]) -> list[list[str]]:
    """Time `lora_init` twice and under one `jax.jit`; return the table's lines."""
    make = maker(scan, rank)
    # Every part starts with nothing compiled, as in a process of its own.
    jax.clear_caches()
    lines = [_line(name, call, make, programs) for call in ("first", "second")]
    jax.clear_caches()
    return [*lines, _line(name, "under one jit", jax.jit(make), programs)]


def _line(name: str, call: str, run: Callable[..., Any], programs: list[float]) -> list[str]:
    key = jax.block_until_ready(jax.random.key(1))
    programs.clear()
    start = time.perf_counter()
    adapter = jax.block_until_ready(run(key))
    seconds = time.perf_counter() - start
    longest = f"{max(programs, default=0.0):.2f}"
    return [name, str(len(adapter.pairs)), call, f"{seconds:.2f}", str(len(programs)), longest]


if __name__ == "__main__":
    main()
