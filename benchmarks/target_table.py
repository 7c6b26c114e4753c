"""Find the smallest accelerators that hold each size of Llama, compiled ahead of time.

For each model and each way to store the base, targets are tried from the smallest to the largest,
until the compiled training step fits. Targets that cannot hold the weights are not compiled. Each
result is recorded, and a second call of the same command continues with the missing ones.

Requires the compilers: the extras `aot-cuda` and, with `--tpu`, `aot-tpu`.

    python -m benchmarks.target_table targets.json
    python -m benchmarks.target_table targets.json --tpu --markdown docs/plan.md
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import jax

from benchmarks import report
from jax_lora.errors import DoesNotFitError
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.accelerators import parse_target
from jax_lora.plan.arithmetic import weight_bytes
from jax_lora.plan.planned_model import PlannedModel, plan_shape
from jax_lora.plan.target_plan import plan_for_target

MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b")
BASES = {"bfloat16": "none", "NF4": "nf4"}
# From the smallest memory to the largest.
GPUS = ("l4:1", "l40s:1", "h100:1", "h100:2", "h100:4", "h100:8", "h100:16", "h100:32")
TPUS = (
    *("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4"),
    *("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4"),
)
LADDERS = {"GPU": GPUS, "TPU": TPUS}
LENGTH = 2048


def main() -> None:
    """Compile what is missing, print the table and, with --markdown, update a document."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("file", type=pathlib.Path, help="JSON file of the results")
    parser.add_argument("--tpu", action="store_true", help="also compile for TPUs")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--markdown", type=pathlib.Path, help="document to update")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a device
    found: dict[str, Any] = json.loads(options.file.read_text()) if options.file.exists() else {}
    keys = []
    for name in options.models:
        for base in BASES:
            for kind in LADDERS if options.tpu else ("GPU",):
                key = f"{name}, {base}, {kind}"
                keys.append(key)
                if key not in found:
                    found[key] = smallest(name, base, LADDERS[kind])
                    options.file.write_text(json.dumps(found, indent=2))
    text = (
        f"{report.compilers(options.tpu)}; one example of {LENGTH:,} tokens per device, rank 16 on "
        "all linear layers. Several devices\nshard the base (`--mesh fsdp=N`). The bound is that "
        "of memory bandwidth and matmuls of all devices together;\ncommunication is not part of it."
        f"\n\n    {report.command('benchmarks.target_table')}\n\n"
        f"{table({key: found[key] for key in keys})}"
    )
    print(text)
    if options.markdown:
        report.write_section(options.markdown, "target_table", text)


def smallest(name: str, base: str, ladder: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the plan of the first target that holds a model, or None."""
    model = plan_shape(name, None)
    for target_name in ladder:
        target = parse_target(target_name)
        weights = weight_bytes(model.shape, 2, BASES[base])
        if weights / target.devices > target.device.memory:
            continue
        try:
            plan = compiled(model, base, target_name)
        except DoesNotFitError:  # the compiler for TPUs compiles no other step
            print(f"{name}, {base}, {target_name}: refused", file=sys.stderr)
            continue
        print(f"{name}, {base}, {target_name}: {plan['peak'] / 1e9:.1f} GB", file=sys.stderr)
        if plan["fits"]:
            return plan
    return None


def compiled(model: PlannedModel, base: str, target_name: str) -> dict[str, Any]:
    """Compile the step of a target; with `--remat auto`, layers are recomputed if needed."""
    target = parse_target(target_name)
    settings = TrainSettings(
        batch_size=target.devices,
        max_seq_length=LENGTH,
        remat="auto",
        mesh="auto" if target.devices == 1 else f"fsdp={target.devices}",
        quantize=BASES[base],
    )
    plan = plan_for_target(model, settings, target, length=LENGTH, targets=LENGTH)
    return plan.as_dict() | {"model": model.name, "base": base}


def table(found: dict[str, Any]) -> str:
    """Return the results as a table; a model that fits nowhere says so."""
    header = [
        "model", "base", "target", "remat", "arguments GB", "peak GB", "of GB",
        "collectives GB", "bound tokens/s",
    ]  # fmt: skip
    return report.table(header, [_row(key, plan) for key, plan in found.items()])


def _row(key: str, plan: dict[str, Any] | None) -> list[str]:
    if plan is None:
        name, base, kind = key.split(", ")
        return [name, base, f"no {kind} tried", *[""] * 6]
    return [
        plan["model"],
        plan["base"],
        plan["target"],
        plan["remat"],
        f"{plan['arguments'] / 1e9:.1f}",
        f"{plan['peak'] / 1e9:.1f}",
        f"{plan['device_memory'] / 1e9:.1f}",
        f"{sum(each['bytes'] for each in plan['collectives'].values()) / 1e9:.1f}",
        f"{plan['tokens_per_second_bound']:,.0f}",
    ]


if __name__ == "__main__":
    main()
