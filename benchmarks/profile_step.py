"""Profile a training step by kind of operation.

    python -m benchmarks.profile_step --rows "hand-written LoRA" "jax_lora (auto)"

Operations run concurrently on several cores, so the sum of their times exceeds the step time.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import gzip
import json
import math
import pathlib
import re
import tempfile

import jax
import optax

from benchmarks import catalogue, forms, hlo, measure, report
from benchmarks.decoder import SIZES

# In the order of the table.
GROUPS = (
    "base products", "low-rank products", "merging W0 + s·A·B", "attention products",
    "head products", "scale on (tokens, out)", "softmax and mask", "norms", "gate",
    "loss and embedding", "optimizer", "layouts", "other",
)  # fmt: skip


def main() -> None:
    """Measure, print the table and, with --markdown, update a document."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", choices=list(SIZES), default="384x6")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(catalogue.ROWS),
        default=[catalogue.FACTORED, "jax_lora (auto)"],
    )
    parser.add_argument("--top", type=int, default=0, help="also list this many single operations")
    parser.add_argument("--markdown", type=pathlib.Path, help="document to update")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    case = forms.Case(SIZES[options.size], rank=options.rank)
    costs = {row: profile(case, row, options.steps) for row in options.rows}
    text = describe(case, costs, options.steps, options.top)
    print(text)
    if options.markdown:
        report.write_section(options.markdown, f"profile_step {options.size}", text)


@dataclasses.dataclass
class Cost:
    """Time and FLOPs of one operation or group.

    Args:
      milliseconds: Time per step.
      flops: Matmul FLOPs per step.
    """

    milliseconds: float = 0.0
    flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """Costs of a row by group, and by operation (group, shape, scope)."""

    groups: dict[str, Cost]
    operations: dict[tuple[str, str, str], Cost]


def profile(case: forms.Case, row: str, steps: int) -> Profile:
    """Run a row under the profiler, and sum its operations by group."""
    weights, tx = forms.make_weights(case), optax.adamw(1e-4)
    form = catalogue.ROWS[row](case, weights)
    compiled = measure.stages(form, tx, weights.tokens).compiled
    run = measure.Run(compiled, form, tx, weights.tokens)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                run.step()
        microseconds = durations(pathlib.Path(folder))
    computations = hlo.read(compiled.as_text())
    groups = {group: Cost() for group in GROUPS}
    operations: dict[tuple[str, str, str], Cost] = collections.defaultdict(Cost)
    for operation in (each for computation in computations.values() for each in computation):
        if operation.name not in microseconds or operation.kind in ("while", "call"):
            continue
        parts = hlo.parts(computations, operation)
        group = group_of(case, parts)
        shape = "x".join(map(str, operation.shape))
        for cost in (groups[group], operations[group, shape, _scope(parts)]):
            cost.milliseconds += microseconds[operation.name] / steps / 1e3
            cost.flops += sum(part.dot_flops for part in parts)
    return Profile(groups, dict(operations))


def durations(folder: pathlib.Path) -> dict[str, float]:
    """Sum the time of each operation in a profile, in microseconds."""
    (path,) = folder.glob("**/*.trace.json.gz")
    total: dict[str, float] = collections.defaultdict(float)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and operation:
            total[operation] += event["dur"]
    return total


def _scope(parts: list[hlo.Operation]) -> str:
    return next((part.scope for part in parts if part.scope), parts[0].kind)


# -----------------------------------------------------------------------------------------------
# Groups of operations
# -----------------------------------------------------------------------------------------------


def group_of(case: forms.Case, parts: list[hlo.Operation]) -> str:
    """Return the group of an operation and of the operations fused into it.

    Matmuls are classified by their shapes, other operations by their name scopes.
    """
    products = [part for part in parts if part.dot_flops]
    if products:
        return _product_group(case, max(products, key=lambda part: part.dot_flops))
    size = case.size
    scopes = " ".join(part.scope for part in parts)
    shapes = {part.shape for part in parts}
    if any(math.prod(shape) == size.batch * size.heads * size.length**2 for shape in shapes):
        return "softmax and mask"
    if any(size.vocabulary in shape for shape in shapes) or "embed" in scopes:
        return "loss and embedding"
    if "norm" in scopes:
        return "norms"
    if re.search(r"_proj/mul\b", scopes):
        return "scale on (tokens, out)"  # including fused transposes
    if any(name in scopes for name in ("silu", "gate_proj", "up_proj", "down_proj")):
        return "gate"
    if _only_moves(parts):
        return "layouts"
    if "jvp" not in scopes:
        return "optimizer"
    if any(shape in _kernel_shapes(case) for shape in shapes) and "block" not in scopes:
        return "merging W0 + s·A·B"
    return "other"


def _product_group(case: forms.Case, product: hlo.Operation) -> str:
    if product.scope.count("->") or len(product.shape) > 3:
        return "attention products"
    sizes = {product.contracted, *product.shape}
    if case.size.vocabulary in sizes:
        return "head products"
    # The factors of up to three kernels with the same input are concatenated.
    return "low-rank products" if min(sizes) <= 3 * case.rank else "base products"


_MOVES = frozenset(
    "fusion parameter copy transpose bitcast reshape tuple get-tuple-element broadcast slice "
    "concatenate pad convert constant call".split()
)


def _only_moves(parts: list[hlo.Operation]) -> bool:
    return all(part.kind in _MOVES for part in parts)


@functools.cache
def _kernel_shapes(case: forms.Case) -> set[tuple[int, ...]]:
    factors = forms.abstract_weights(case).factors.values()
    shapes = {(a.shape[0], b.shape[1]) for a, b in factors}
    return shapes | {shape[::-1] for shape in shapes}


# -----------------------------------------------------------------------------------------------
# The table
# -----------------------------------------------------------------------------------------------


def describe(case: forms.Case, profiles: dict[str, Profile], steps: int, top: int) -> str:
    """Return a table of groups, and with --top of single operations."""
    header = ["operations"]
    for row in profiles:
        header += [f"{row}: ms", "share", "matmul GFLOP", "GFLOP/s"]
    body = [[group] for group in GROUPS]
    for each in profiles.values():
        total = sum(cost.milliseconds for cost in each.groups.values())
        for line, group in zip(body, GROUPS, strict=True):
            cost = each.groups[group]
            rate = f"{cost.flops / cost.milliseconds / 1e6:.0f}" if cost.flops else ""
            flops = f"{cost.flops / 1e9:.2f}" if cost.flops else ""
            line += [f"{cost.milliseconds:.0f}", f"{cost.milliseconds / total:.0%}", flops, rate]
    about = (
        f"{case.size.layers} layers, width {case.size.width}, {case.size.tokens:,} tokens, rank "
        f"{case.rank}; {report.machine()}; mean of {steps} steps."
    )
    command = report.command("benchmarks.profile_step")
    text = f"{about}\n\n    {command}\n\n{report.table(header, body)}"
    for row, each in profiles.items() if top else ():
        costly = sorted(each.operations.items(), key=lambda item: -item[1].milliseconds)[:top]
        lines = [[*key, f"{cost.milliseconds:.1f}"] for key, cost in costly]
        text += f"\n\n{row}:\n\n{report.table(['group', 'shape', 'scope', 'ms'], lines)}"
    return text


if __name__ == "__main__":
    main()
