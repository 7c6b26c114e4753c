"""Compare a training step with torch and PEFT: same model, weights, tokens and machine.

    python -m benchmarks.versus_peft --size 384x6 --rounds 9
    python -m benchmarks.versus_peft --platform gpu --size 1b --dtype bfloat16

Requires torch and peft, which are not dependencies of this library; install torch first.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import statistics

import jax
import jax.numpy as jnp
import optax

from benchmarks import catalogue, forms, measure, report
from benchmarks.decoder import SIZES

# Name -> whether the model is compiled, and whether fused attention is used.
PEFT_ROWS = {
    "PEFT, eager": (False, False),
    "PEFT, compiled": (True, False),
    "PEFT, eager, fused attention": (False, True),
    "PEFT, compiled, fused attention": (True, True),
}
JAX_ROWS = (catalogue.FACTORED, "hand-written, tokens flattened", "jax_lora (auto)")
REFERENCE = "PEFT, eager"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", choices=list(SIZES), default="384x6")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", type=pathlib.Path, help="document to update")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table and, with --markdown, update a document."""
    options = arguments()
    # Both frameworks share the memory of the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(options.platform, options.platform))
    case = forms.Case(SIZES[options.size], rank=options.rank, dtype=jnp.dtype(options.dtype))
    text = compare(case, options.rounds, "cuda" if options.platform == "gpu" else "cpu")
    print(text)
    if options.markdown:
        name = f"versus_peft {options.platform} {options.size} {options.dtype}"
        report.write_section(options.markdown, name, text)


def compare(case: forms.Case, rounds: int, device: str) -> str:
    """Time all rows interleaved, and return the table."""
    import torch  # type: ignore[import-not-found]

    from benchmarks.torch_decoder import PeftRun

    weights, tx = forms.make_weights(case), optax.adamw(1e-4)
    runs, flops, first, losses = {}, {}, {}, {}
    for row, (compiled, fused) in PEFT_ROWS.items():
        peft_run = PeftRun(case, weights, device, compiled, fused)
        runs[row], first[row] = peft_run.step, peft_run.first_seconds
        losses[row] = peft_run.first_loss
        if not compiled:
            flops[row] = peft_run.flops()
    for row in JAX_ROWS:
        form = catalogue.ROWS[row](case, weights)
        losses[row] = float(jax.jit(form.loss)(form.trainable, form.frozen, weights.tokens))
        figures, compiled_step = measure.figures(form, tx, weights.tokens)
        flops[row] = figures.dot_flops
        first[row] = figures.trace_seconds + figures.lower_seconds + figures.compile_seconds
        runs[row] = measure.Run(compiled_step, form, tx, weights.tokens).step
    _check(losses, 1e-4 if case.dtype == jnp.float32 else 2e-2)
    seconds = measure.interleave(runs, rounds)
    header = ["step", "matmul GFLOP", "step s", "/PEFT, eager", "first step s", "loss"]
    of = functools.partial(measure.ratio, reference=seconds[REFERENCE])
    body = [
        [
            row, f"{flops[row] / 1e9:.2f}" if row in flops else "-",
            f"{statistics.median(seconds[row]):.3f}", f"{of(seconds[row]):.2f}",
            f"{first[row]:.1f}", f"{losses[row]:.4f}",
        ]
        for row in runs
    ]  # fmt: skip
    about = (
        f"{case.size.layers} layers, width {case.size.width}, {case.size.tokens:,} tokens, "
        f"{jnp.dtype(case.dtype).name}, rank {case.rank}; {report.machine()}, "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads; "
        f"medians of {rounds} interleaved rounds."
    )
    command = report.command("benchmarks.versus_peft")
    return f"{about}\n\n    {command}\n\n{report.table(header, body)}"


def _check(losses: dict[str, float], tolerance: float) -> None:
    want = losses[REFERENCE]
    for row, loss in losses.items():
        if abs(loss - want) > tolerance * abs(want):
            raise RuntimeError(f"{row}: loss {loss}, expected {want} as in {REFERENCE}")


if __name__ == "__main__":
    main()
