"""Plan a training step for devices that are not here: compile it, and read what it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from jax_lora.errors import DoesNotFitError
from jax_lora.finetune.memory import is_out_of_memory
from jax_lora.finetune.optimization_level import at_optimization_level
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.accelerators import Target
from jax_lora.plan.compiled_step import StepMemory, memory_of, trace_step
from jax_lora.plan.hlo_traffic import Collective, hlo_traffic
from jax_lora.plan.matmul_flops import matmul_flops
from jax_lora.plan.planned_model import PlannedModel
from jax_lora.plan.topology import abstract_devices, compiler_options
from jax_lora.transform.strategies import ALIASES


@dataclasses.dataclass(frozen=True)
class TargetPlan:
    """What one training step needs on each device of a target."""

    target: Target
    remat: str  # what layers keep for the backward pass
    memory: StepMemory  # of one device
    traffic: float  # bytes that one device reads and writes, except inside fused attention kernels
    collectives: dict[str, Collective]  # what one device sends and receives, by kind
    matmul_flops: float  # of one device
    attention_flops: float  # of the fused attention kernels of one device, by formula
    tokens: int  # of the whole batch

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
        collectives = {kind: dataclasses.asdict(each) for kind, each in self.collectives.items()}
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
            "collectives": collectives,
            "matmul_flops": self.matmul_flops,
            "attention_flops": self.attention_flops,
            "memory_seconds": self.memory_seconds,
            "matmul_seconds": self.matmul_seconds,
            "tokens": self.tokens,
            "tokens_per_second_bound": self.tokens_per_second,
            "compile_seconds": self.memory.seconds,
        }


def plan_for_target(
    model: PlannedModel, settings: TrainSettings, target: Target, *, length: int, targets: int
) -> TargetPlan:
    """Compile the training step for a target, and read what it needs.

    With `remat="auto"`, the step is compiled for `"full"` if it does not fit with `"names"`.
    `targets` counts the target tokens per example.

    Raises:
      ConfigError: The compiler is not installed, or does not support the target.
      DoesNotFitError: The step needs more memory than the devices have, and their compiler refuses
        it, as the compiler for TPUs does. For other devices, `fits` of the plan is False.
    """
    platform = ALIASES.get(target.device.platform, target.device.platform)
    shape = {"length": length, "targets": targets}
    where = {"devices": abstract_devices(target), "platform": platform}
    trace = functools.partial(trace_step, model, settings, **shape, **where)
    plan_with = functools.partial(_compile, model, settings, target, length, trace)
    remat = settings.remat_on(platform)
    if not settings.fits_remat:
        return plan_with(remat)
    with contextlib.suppress(DoesNotFitError):
        found = plan_with(remat)
        if found.fits:
            return found
    return plan_with("full")


def _compile(
    model: PlannedModel,
    settings: TrainSettings,
    target: Target,
    length: int,
    trace: Callable[..., tuple[Any, int]],
    remat: str,
) -> TargetPlan:
    began = time.perf_counter()
    traced, shared = trace(remat=remat)
    with at_optimization_level(target.device.platform, target.devices):
        lowered = traced.lower()
        try:
            compiled = lowered.compile(compiler_options=compiler_options(target))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise _does_not_fit(target, remat, str(error)) from error
    memory = memory_of(compiled, shared, time.perf_counter() - began)
    text = compiled.as_text()
    traffic = hlo_traffic(text)
    if memory is None:
        raise RuntimeError(f"XLA for {target.name} reports no memory")
    tokens = settings.batch_size * settings.grad_accumulation_steps * length
    fused = "fmha" in text or "splash" in text
    return TargetPlan(
        target=target,
        remat=remat,
        memory=memory,
        traffic=traffic.bytes,
        collectives=traffic.collectives,
        matmul_flops=matmul_flops(traced.jaxpr.jaxpr) / shared,
        attention_flops=attention_flops(model, tokens // shared, length, remat) if fused else 0.0,
        tokens=tokens,
    )


def _does_not_fit(target: Target, remat: str, message: str) -> DoesNotFitError:
    """Explain why the compiler refuses a step: "... (21.79G) exceeds available HBM (15.75G)."."""
    sizes = re.search(r"\(([\d.]+[KMGT]?)\) exceeds [^(]*\(([\d.]+[KMGT]?)\)", message)
    found = f"{sizes[1]}B" if sizes else message.strip().partition("\n")[0][:200]
    most = f"at most {sizes[2]}B a device" if sizes else "a step that fits into its memory"
    return DoesNotFitError(
        f"topology {target.name}",
        got=f"a step that does not fit, with remat {remat!r}: {found}",
        expected=most,
        fix="Choose larger devices, share the model among more of them with a mesh such as "
        "fsdp=4, quantize the base, or shorten the batch or its sequences.",
    )


def attention_flops(model: PlannedModel, tokens: int, length: int, remat: str) -> float:
    """Count the FLOPs of causal attention in a fused kernel, by formula.

    Two matmuls forward and five backward, half of each masked; a recomputed forward runs twice.
    """
    shape = model.shape
    one = 2 * tokens * length * shape.num_heads * shape.head_dim / 2
    return shape.num_layers * one * (9 if remat == "full" else 7)
