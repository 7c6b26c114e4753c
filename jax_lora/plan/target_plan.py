"""Plan a training step for devices that are not here: compile it, and read what it needs."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from jax_lora.finetune.optimization_level import at_optimization_level
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.accelerators import Target
from jax_lora.plan.compiled_step import StepMemory, TargetDevices, memory_of, trace_step
from jax_lora.plan.hlo_traffic import Collective, hlo_traffic
from jax_lora.plan.matmul_flops import matmul_flops
from jax_lora.plan.planned_model import PlannedModel
from jax_lora.plan.topology import abstract_devices, compiler_options
from jax_lora.transform.strategies import ALIASES


@dataclasses.dataclass(frozen=True)
class TargetPlan:
    """What one training step needs on each device of a target.

    Args:
      target: The devices.
      remat: What layers keep for the backward pass.
      memory: Memory of one device.
      traffic: Bytes that one device reads and writes, except inside fused attention kernels.
      collectives: What one device sends and receives, by kind.
      matmul_flops: Operations of the matmuls of one device.
      attention_flops: Operations of the fused attention kernels of one device, by formula.
      tokens: Tokens of the whole batch.
      seconds: Time to compile.
    """

    target: Target
    remat: str
    memory: StepMemory
    traffic: float
    collectives: dict[str, Collective]
    matmul_flops: float
    attention_flops: float
    tokens: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step fits into the device's memory."""
        return self.memory.peak <= self.target.device.memory

    @property
    def memory_seconds(self) -> float:
        """The least time for the traffic, at the device's bandwidth."""
        return self.traffic / self.target.device.bandwidth

    @property
    def matmul_seconds(self) -> float:
        """The least time for matmuls and attention, at the device's peak rate."""
        return (self.matmul_flops + self.attention_flops) / self.target.device.flops

    @property
    def tokens_per_second(self) -> float:
        """The bound on the speed of all devices together; communication is not part of it."""
        return self.tokens / max(self.memory_seconds, self.matmul_seconds)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            "target": self.target.name,
            "devices": self.target.devices,
            "remat": self.remat,
            "fits": self.fits,
            "arguments": self.memory.arguments,
            "temporaries": self.memory.temporary,
            "peak": self.memory.peak,
            "device_memory": self.target.device.memory,
            "traffic": self.traffic,
            "collectives": {
                kind: dataclasses.asdict(each) for kind, each in self.collectives.items()
            },
            "matmul_flops": self.matmul_flops,
            "attention_flops": self.attention_flops,
            "memory_seconds": self.memory_seconds,
            "matmul_seconds": self.matmul_seconds,
            "tokens": self.tokens,
            "tokens_per_second_bound": self.tokens_per_second,
            "compile_seconds": self.seconds,
        }


def plan_for_target(
    model: PlannedModel, settings: TrainSettings, target: Target, *, length: int, targets: int
) -> TargetPlan:
    """Compile the training step for a target, and read what it needs.

    With `remat="auto"`, the step is compiled for `"full"` if it does not fit with `"names"`.

    Args:
      model: The model.
      settings: Settings of the run.
      target: The devices.
      length: Sequence length.
      targets: Target tokens per example.

    Returns:
      The plan.

    Raises:
      ConfigError: The compiler is not installed, or does not support the target.
    """
    platform = ALIASES.get(target.device.platform, target.device.platform)
    devices = TargetDevices(abstract_devices(target), platform, compiler_options(target))
    remat = settings.remat_on(platform)
    found = _compile(model, settings, target, devices, length, targets, remat)
    if settings.fits_remat and not found.fits:
        return _compile(model, settings, target, devices, length, targets, "full")
    return found


def _compile(
    model: PlannedModel,
    settings: TrainSettings,
    target: Target,
    devices: TargetDevices,
    length: int,
    targets: int,
    remat: str,
) -> TargetPlan:
    began = time.perf_counter()
    traced, shared = trace_step(
        model, settings, length=length, targets=targets, remat=remat, target=devices
    )
    with at_optimization_level(target.device.platform, target.devices):
        compiled = traced.lower().compile(compiler_options=dict(devices.options))
    seconds = time.perf_counter() - began
    text = compiled.as_text()
    traffic = hlo_traffic(text)
    memory = memory_of(compiled, shared, seconds)
    if memory is None:
        raise RuntimeError(f"XLA for {target.name} reports no memory")
    tokens = settings.batch_size * settings.grad_accumulation_steps * length
    flops = matmul_flops(traced.jaxpr.jaxpr)
    return TargetPlan(
        target=target,
        remat=remat,
        memory=memory,
        traffic=traffic.bytes,
        collectives=traffic.collectives,
        matmul_flops=flops / shared,
        attention_flops=attention_flops(model, tokens // shared, length, remat)
        if "fmha" in text or "splash" in text
        else 0.0,
        tokens=tokens,
        seconds=seconds,
    )


def attention_flops(model: PlannedModel, tokens: int, length: int, remat: str) -> float:
    """Count the FLOPs of causal attention in a fused kernel, by formula.

    Two matmuls forward and five backward, half of each masked; a recomputed forward runs twice.

    Args:
      model: The model.
      tokens: Tokens of the batch.
      length: Sequence length.
      remat: What layers keep for the backward pass.

    Returns:
      FLOPs.
    """
    shape = model.shape
    one = 2 * tokens * length * shape.num_heads * shape.head_dim / 2
    return shape.num_layers * one * (9 if remat == "full" else 7)
