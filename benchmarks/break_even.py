"""Measure the number of tokens from which the merged form is at least as fast as the factored form.

    python -m benchmarks.break_even --rounds 9

Each row is a kernel with a share of `in·out / (in + out)` tokens, the threshold of `lora_apply`. A
step is the forward and backward pass of the kernel: its output, dx, da and db. The columns are
ratios of merged to factored; below 1 the merged form is better.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jax_lora as jl

KERNELS = ((384, 384), (384, 1024), (768, 768), (768, 2048), (2048, 2048))
SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
FORMS = ("merged", "factored")


def main() -> None:
    """Measure and print the table."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print("| kernel | tokens | share | flops | bytes | time |\n|---|---:|---:|---:|---:|---:|")
    for inputs, outputs in KERNELS:
        for share in SHARES:
            tokens = int(share * inputs * outputs / (inputs + outputs))
            flops, accessed, seconds = compare(
                tokens, inputs, outputs, options.rank, options.rounds
            )
            print(
                f"| {inputs} x {outputs} | {tokens:,} | {share} "
                f"| {flops:.3f} | {accessed:.3f} | {seconds:.2f} |",
                flush=True,
            )


def compare(
    tokens: int, inputs: int, outputs: int, rank: int, rounds: int
) -> tuple[float, float, float]:
    """Return the ratios of merged to factored: FLOPs, bytes accessed and median time."""
    params = {"kernel": jnp.ones((inputs, outputs))}
    adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=rank))
    args = (params, adapter, jnp.ones((tokens, inputs)), jnp.ones((tokens, outputs)))
    compiled = [jax.jit(step(form)).lower(*args).compile() for form in FORMS]
    flops, accessed = (
        _figure(compiled[0], name) / _figure(compiled[1], name)
        for name in ("flops", "bytes accessed")
    )
    ratios = []
    for _ in range(rounds):
        merged, factored = (_seconds(function, args) for function in compiled)
        ratios.append(merged / factored)
    return flops, accessed, statistics.median(ratios)


def _figure(function: Any, name: str) -> float:
    return function.cost_analysis()[name]


def step(form: str) -> Callable[..., Any]:
    """Return the forward and backward pass of one kernel."""
    product = jl.lora_apply(lambda params, x: x @ params["kernel"], form=form)

    def run(params: Any, adapter: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        result, pull = jax.vjp(lambda a, x: product(jl.combine(params, a), x), adapter, x)
        return result, pull(cotangent)

    return run


def _seconds(function: Any, args: Any, repeats: int = 5) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(function(*args))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
