"""Measure the time to initialize the adapter of a model with 7B parameters.

    python -m benchmarks.init_time

The base model exists as shapes only. The first call includes compilation; the second does not.
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

# The event of jax.monitoring for each compilation.
_COMPILED = "/jax/core/compile/backend_compile_duration"


def main() -> None:
    """Measure, print the table and, with --markdown, update a document."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--markdown", type=pathlib.Path, help="document to update")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    compilations: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            compilations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    body = [
        line
        for name, scan in (("32 layers, scanned", True), ("32 layers, unrolled", False))
        for line in measure(name, scan, options.rank, compilations)
    ]
    header = ["model", "pairs", "call", "seconds", "compilations", "longest compile s"]
    about = f"A decoder of 7B parameters, rank {options.rank}; {report.machine()}."
    command = report.command("benchmarks.init_time")
    text = f"{about}\n\n    {command}\n\n{report.table(header, body)}"
    print(text)
    if options.markdown:
        report.write_section(options.markdown, "init_time", text)


def maker(scan: bool, rank: int) -> Callable[[jax.Array], jl.Adapter]:
    """Return a function from a key to the adapter of a 7B decoder."""
    case = forms.Case(SEVEN_B, rank=rank, scan=scan, dtype=jnp.dtype("bfloat16"))
    weights = forms.abstract_weights(case)
    kernels = jl.find_kernels(case.decoder().apply, weights.base, weights.tokens)
    config = jl.LoraConfig(rank=rank)
    return lambda key: jl.lora_init(key, weights.base, config, kernels=kernels)


def measure(name: str, scan: bool, rank: int, compilations: list[float]) -> list[list[str]]:
    """Time two calls of `lora_init` and one under `jax.jit`; return the rows of the table."""
    make = maker(scan, rank)
    # Clear the caches, as in a new process.
    jax.clear_caches()
    lines = [_line(name, call, make, compilations) for call in ("first", "second")]
    jax.clear_caches()
    return [*lines, _line(name, "under one jit", jax.jit(make), compilations)]


def _line(name: str, call: str, run: Callable[..., Any], compilations: list[float]) -> list[str]:
    key = jax.block_until_ready(jax.random.key(1))
    compilations.clear()
    start = time.perf_counter()
    adapter = jax.block_until_ready(run(key))
    seconds = time.perf_counter() - start
    longest = f"{max(compilations, default=0.0):.2f}"
    return [name, str(len(adapter.pairs)), call, f"{seconds:.2f}", str(len(compilations)), longest]


if __name__ == "__main__":
    main()
