"""Compile training steps for accelerators that are not here, and check their traffic and memory.

The exit status is 1 if a limit is exceeded. Requires the compilers: the extras `aot-cuda` and,
with `--tpu`, `aot-tpu`. A GPU takes about two minutes in total, a TPU several minutes.

    python -m benchmarks.ahead_of_time
    python -m benchmarks.ahead_of_time --tpu --markdown docs/performance.md
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

import jax

from benchmarks import report
from benchmarks.bars import Limit
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.accelerators import parse_target
from jax_lora.plan.planned_model import plan_shape
from jax_lora.plan.target_plan import TargetPlan, plan_for_target


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step: examples of `length` tokens, LoRA of rank 16 on all linear layers.

    Args:
      model: Name of a published model.
      length: Sequence length.
      remat: What layers keep for the backward pass.
      pack: Whether the example is packed.
      target: The devices.
      mesh: Sizes of the mesh, which has one example for each device.
      quantize: How the base model is stored.
    """

    model: str
    length: int
    remat: str = "names"
    pack: bool = False
    target: str = "h100:1"
    mesh: str = "auto"
    quantize: str = "none"

    @property
    def examples(self) -> int:
        """Count the examples of a batch."""
        return parse_target(self.target).devices

    def __str__(self) -> str:
        """Return the first cell of the table."""
        packed = ", packed" if self.pack else ""
        mesh = "" if self.mesh == "auto" else f", {self.mesh}"
        stored = "" if self.quantize == "none" else f", {self.quantize}"
        batch = f"{self.examples} x {self.length:,}"
        return f"{self.target}, {self.model}, {batch}, {self.remat}{packed}{stored}{mesh}"


LLAMA_8B = Case("llama-3-8b", 4096)
EVERYTHING, FULL, PACKED = (
    dataclasses.replace(LLAMA_8B, **change)
    for change in ({"remat": "none"}, {"remat": "full"}, {"pack": True})
)
LLAMA_1B = Case("llama-3.2-1b", 2048)
TPU = dataclasses.replace(LLAMA_1B, target="v5p:1x1x1")
GPU_MESH = Case("llama-3-8b", 4096, "full", target="h100:8", mesh="fsdp=8")
TPU_MESH = Case("llama-3-8b", 2048, "full", target="v5e:2x4", mesh="fsdp=8")
NF4, NF4_FULL = (
    dataclasses.replace(LLAMA_8B, quantize="nf4"),
    Case("llama-3-8b", 2048, "full", quantize="nf4"),
)
NF4_70B = Case("llama-3-70b", 2048, "full", quantize="nf4")
GPU_CASES = (
    EVERYTHING, LLAMA_8B, FULL, PACKED, LLAMA_1B, NF4, NF4_FULL, NF4_70B, GPU_MESH,
)  # fmt: skip
TPU_CASES = (TPU, TPU_MESH)


def main() -> None:
    """Compile, print the tables and, with --markdown, update a document."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tpu", action="store_true", help="also compile for TPUs")
    parser.add_argument("--markdown", type=pathlib.Path, help="document to update")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a device
    plans = {case: compile_case(case) for case in (*GPU_CASES, *TPU_CASES * options.tpu)}
    bars = limits(plans)
    text = (
        f"{report.compilers(options.tpu)}; one example per device; rank 16, all linear layers, "
        "bfloat16.\n\n"
        f"    {report.command('benchmarks.ahead_of_time')}\n\n{figures(plans)}\n\n{table(bars)}"
    )
    print(text)
    if options.markdown:
        report.write_section(options.markdown, "ahead_of_time", text)
    sys.exit(not all(limit.passed for limit in bars))


def compile_case(case: Case) -> TargetPlan:
    """Compile the step of a case."""
    settings = TrainSettings(
        batch_size=case.examples,
        max_seq_length=case.length,
        remat=case.remat,
        pack=case.pack,
        mesh=case.mesh,
        quantize=case.quantize,
    )
    model, target = plan_shape(case.model, None), parse_target(case.target)
    return plan_for_target(model, settings, target, length=case.length, targets=case.length)


def figures(plans: dict[Case, TargetPlan]) -> str:
    """Return the table of the figures of one device."""
    header = [
        "device, model, tokens, remat", "matmul TFLOP", "traffic GB", "temporaries GB", "peak GB",
        "collectives GB", "bound tokens/s",
    ]  # fmt: skip
    return report.table(header, [_row(case, plan) for case, plan in plans.items()])


def _row(case: Case, plan: TargetPlan) -> list[str]:
    return [
        str(case),
        f"{plan.matmul_flops / 1e12:.1f}",
        f"{plan.traffic / 1e9:.1f}",
        f"{plan.memory.temporary / 1e9:.1f}",
        f"{plan.memory.peak / 1e9:.1f}",
        f"{collective_bytes(plan) / 1e9:.1f}",
        f"{plan.tokens_per_second:,.0f}",
    ]


def collective_bytes(plan: TargetPlan) -> float:
    """Sum the bytes of all collectives of one device."""
    return sum(each.bytes for each in plan.collectives.values())


def arguments_gb(plan: TargetPlan) -> float:
    """Return the size of a step's arguments, in gigabytes."""
    return plan.memory.arguments / 1e9


def limits(plans: dict[Case, TargetPlan]) -> list[Limit]:
    """Compare the figures with their limits."""
    names, full, packed, small = (plans[each] for each in (LLAMA_8B, FULL, PACKED, LLAMA_1B))
    bars = [
        Limit("8B, names: traffic GB", 345, names.traffic / 1e9),
        Limit("8B, names: temporaries GB", 20, names.memory.temporary / 1e9),
        Limit("8B, names: matmul TFLOP", 128.5, names.matmul_flops / 1e12),
        Limit("8B, full: traffic GB", 345, full.traffic / 1e9),
        Limit("8B, full: peak GB", 19.3, full.memory.peak / 1e9),
        Limit("8B, names: traffic, packed / not packed", 1.05, packed.traffic / names.traffic),
        Limit("1B, names: traffic GB", 95, small.traffic / 1e9),
        Limit("8B, NF4, names: traffic, NF4 / bfloat16", 1.25, plans[NF4].traffic / names.traffic),
        Limit("8B, NF4, 1 x 2,048, full: arguments GB", 6.3, arguments_gb(plans[NF4_FULL])),
        Limit("8B, NF4, 1 x 2,048, full: peak GB", 9.5, plans[NF4_FULL].memory.peak / 1e9),
        Limit("70B, NF4, 1 x 2,048, full: peak GB", 48, plans[NF4_70B].memory.peak / 1e9),
        Limit("8B, 8 x H100, fsdp=8: collectives GB", 32, collective_bytes(plans[GPU_MESH]) / 1e9),
    ]
    if TPU in plans:
        bars += [
            Limit("1B on v5p, names: traffic GB", 38, plans[TPU].traffic / 1e9),
            Limit("1B on v5p, names: temporaries GB", 5, plans[TPU].memory.temporary / 1e9),
        ]
    if TPU_MESH in plans:
        peak = plans[TPU_MESH].memory.peak
        bars.append(Limit("8B, v5e:2x4, fsdp=8: peak GB", 4.2, peak / 1e9))
    return bars


def table(bars: list[Limit]) -> str:
    """Return the table of limits."""
    body: list[list[Any]] = [
        [limit.what, f"{limit.most:g}", f"{limit.value:.3f}", "yes" if limit.passed else "NO"]
        for limit in bars
    ]
    return report.table(["limit", "at most", "measured", "passed"], body)


if __name__ == "__main__":
    main()
