"""Plan a run: combine its settings, model and data into estimates and a compiled step."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.finetune.batch_source import import_grain
from jax_lora.finetune.memory import release_freed_memory, resident_memory
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.arithmetic import Residuals, Step
from jax_lora.plan.compiled_step import StepMemory, abstract_adapter, step_memory
from jax_lora.plan.data_shapes import DataShapes
from jax_lora.plan.methods import Estimate, Method, side_by_side
from jax_lora.plan.planned_model import PlannedModel
from jax_lora.plan.residuals import trace_residuals
from jax_lora.transform.strategies import target_platform

COMPILE_UP_TO = 1_500_000_000  # parameters; larger models are planned by formula only


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    model: PlannedModel
    data: DataShapes
    settings: TrainSettings
    method: Method  # of this run
    columns: dict[str, Estimate]  # estimates of every method for the largest batch on one device
    steps: int | None  # training steps; None without data
    flops: dict[str, float]  # of the run by method; of one step if `steps` is None
    compiled: StepMemory | None  # memory of the compiled step; None if it was not compiled
    why: str  # why the step was not compiled, or an empty string
    # Memory of Python, JAX and the compiled step, from `process_memory`; None if it does not count
    # or the step was not compiled.
    process: int | None = None


def make_plan(
    model: PlannedModel, data: DataShapes, settings: TrainSettings, *, compiling: bool = True
) -> Plan:
    """Plan a run, and compile its training step if `compiling` is set and the step can be compiled.

    Raises:
      NoMatchError: A target matches no kernel of the model.
    """
    method = method_of(model, settings, trace_residuals(model, settings))
    length, targets, _ = data.largest
    step = step_of(settings, length, targets)
    steps = settings.iters if data.per_epoch is None else settings.iterations(data.per_epoch)
    why = why_not_compiled(model, length) if compiling else "--no-compile was given"
    compiled = None if why else step_memory(model, settings, length=length, targets=targets)
    if compiled is None and not why:
        why = "this backend does not report the memory of compiled functions"
    return Plan(
        model=model,
        data=data,
        settings=settings,
        method=method,
        columns=side_by_side(method, step),
        steps=steps,
        flops=_flops(method, settings, data, steps),
        compiled=compiled,
        why=why,
        process=None if compiled is None else process_memory(),
    )


def process_memory() -> int | None:
    """Measure the memory of a run beside its arrays: Python, JAX and the compiled step.

    Call it after the step was compiled. This process holds the same as one that trains, but no
    weights. None if the arrays are in the memory of an accelerator, or the system does not say.
    """
    if target_platform(()) != "cpu":
        return None
    import_grain()  # as the first step of a run does
    release_freed_memory()
    return resident_memory()


def method_of(
    model: PlannedModel, settings: TrainSettings, residuals: Residuals | None = None
) -> Method:
    """Describe the method of a run for the formulas, with the result of `trace_residuals`."""
    adapter = abstract_adapter(model, settings)
    paths = {path.removeprefix("params/") for path in adapter.pairs}
    return Method(
        shape=model.shape,
        adapted=tuple(kernel for kernel in model.shape.kernels if kernel.path in paths),
        rank=settings.rank,
        trainable=adapter.size,
        itemsize=jnp.dtype(model.dtype).itemsize,
        optimizer=settings.optimizer,
        full=settings.fine_tune_type == "full",
        quantize=settings.quantize,
        residuals=residuals,
        on_cpu=target_platform(()) == "cpu",
    )


def step_of(settings: TrainSettings, length: int, targets: int, devices: int = 1) -> Step:
    """Describe a step on one of several devices that share a batch."""
    return Step(
        batch_size=settings.batch_size // devices,
        length=length,
        targets=targets,
        accumulation=settings.grad_accumulation_steps,
        remat=settings.remat_on(target_platform(())) == "full",
        loss_chunk=settings.loss_chunk,
    )


def why_not_compiled(model: PlannedModel, length: int = 0) -> str:
    """Return why the step cannot be compiled, or an empty string if it can."""
    reasons = {
        "jax_lora does not implement this model": model.module is None,
        "only the training steps of decoders are compiled": not model.decodes,
        "the model has more than 1.5 G parameters": model.shape.size > COMPILE_UP_TO,
        f"the model has only {model.max_length} positions": length > model.max_length,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _flops(
    method: Method, settings: TrainSettings, data: DataShapes, steps: int | None
) -> dict[str, float]:
    """Compute the operations of the run by method: the mean over an epoch times the steps."""
    batches = sum(shape.batches for shape in data.shapes)
    sums: dict[str, float] = {}
    for length, targets, count in data.shapes:
        for name, column in side_by_side(method, step_of(settings, length, targets)).items():
            sums[name] = sums.get(name, 0.0) + column.flops * count / batches
    return {name: mean * (steps or 1) for name, mean in sums.items()}


def matmul_rate(dtype: Any = jnp.float32) -> float:
    """Measure the FLOP/s of matmuls of square matrices on the default device, for 0.3 s.

    A training step is slower: norms, softmax and low-rank products are limited by memory bandwidth.
    """
    size = 1024 if jax.default_backend() == "cpu" else 4096
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.3:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
