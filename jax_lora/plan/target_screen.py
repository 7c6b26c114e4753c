"""Format the plan for a target as text of at most 80 columns."""

from __future__ import annotations

from jax_lora.finetune.devices import AUTO
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.data_shapes import DataShapes
from jax_lora.plan.plan_tables import wrapped
from jax_lora.plan.planned_model import PlannedModel
from jax_lora.plan.target_plan import TargetPlan
from jax_lora.plan.units import show_bytes


def target_lines(
    model: PlannedModel, settings: TrainSettings, data: DataShapes, plan: TargetPlan
) -> list[str]:
    """Format a plan for a target."""
    target, device, memory = plan.target, plan.target.device, plan.memory
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    examples = settings.batch_size * settings.grad_accumulation_steps
    method = settings.fine_tune_type
    packed = ", packed" if settings.pack else ""
    head = {
        "Model": f"{model.name}, {model.dtype}, {model.shape.size:,} parameters",
        "Target": f"{target.devices} x {target.kind}: {show_bytes(device.memory)}, "
        f"{device.bandwidth / 1e9:,.0f} GB/s, {device.flops / 1e12:,.0f} TFLOP/s",
        "Step": f"{method}, rank {settings.rank}, {examples} x {data.largest.length:,} tokens"
        f"{packed}, remat {plan.remat}",
    }
    if settings.mesh != AUTO:
        head["Mesh"] = settings.mesh
    figures = {
        "arguments": show_bytes(memory.arguments),
        "temporaries": show_bytes(memory.temporary),
        "peak": f"{show_bytes(memory.peak)}   {verdict} ({memory.peak / device.memory:.0%})",
        "memory traffic": f"{show_bytes(plan.traffic)}   {plan.memory_seconds:.3f} s",
        "matmuls": f"{plan.matmul_flops / 1e12:,.1f} TFLOP",
        "attention kernels": f"{plan.attention_flops / 1e12:,.1f} TFLOP (by formula)",
        "matmuls, attention": f"{plan.matmul_seconds:.3f} s",
    }
    if not plan.attention_flops:
        del figures["attention kernels"]
    for kind, each in sorted(plan.collectives.items()):
        figures[kind] = f"{show_bytes(each.bytes)}   in {each.count:,}"
    bound = "bandwidth" if plan.memory_seconds > plan.matmul_seconds else "matmul rate"
    figures["at most"] = f"{plan.tokens_per_second:,.0f} tokens/s   bound by {bound}"
    return [
        *(f"{name:<7}{text}" for name, text in head.items()),
        "",
        "Each device, compiled ahead of time:",
        *(f"  {name:<19}{text}" for name, text in figures.items()),
        "",
        "The bound ignores launch times, caches and communication: expect half of it.",
        *wrapped(f"Data: {data.note}." if data.note else ""),
    ]
