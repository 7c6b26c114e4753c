"""Plan a run: combine its settings, model and data into estimates and a compiled step."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

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
class Choices:
    """The settings that determine memory and time.

    Args:
      settings: Settings of `train`.
    """

    settings: TrainSettings


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Args:
      model: The model.
      data: Batch shapes of the data.
      choices: Settings of the run.
      method: The method of this run.
      columns: Estimates of every method for the largest batch on one device.
      steps: Training steps, or None without data.
      flops: Operations of the run by method, or of one step if `steps` is None.
      compiled: Memory of the compiled step, or None if it was not compiled.
      why: Why the step was not compiled, or an empty string.
    """

    model: PlannedModel
    data: DataShapes
    choices: Choices
    method: Method
    columns: dict[str, Estimate]
    steps: int | None
    flops: dict[str, float]
    compiled: StepMemory | None
    why: str


def make_plan(
    model: PlannedModel, data: DataShapes, choices: Choices, *, compiling: bool = True
) -> Plan:
    """Plan a run, and compile its training step if `compiling` is set and the step can be compiled.

    Raises:
      NoMatchError: A target matches no kernel of the model.
    """
    settings = choices.settings
    method = method_of(model, choices, trace_residuals(model, settings))
    length, targets, _ = data.largest
    step = step_of(choices, length, targets)
    steps = settings.iters if data.per_epoch is None else settings.iterations(data.per_epoch)
    why = why_not_compiled(model, choices, length) if compiling else "--no-compile was given"
    compiled = None if why else step_memory(model, settings, length=length, targets=targets)
    if compiled is None and not why:
        why = "this backend does not report the memory of compiled functions"
    return Plan(
        model=model,
        data=data,
        choices=choices,
        method=method,
        columns=side_by_side(method, step),
        steps=steps,
        flops=_flops(method, choices, data, steps),
        compiled=compiled,
        why=why,
    )


def method_of(model: PlannedModel, choices: Choices, residuals: Residuals | None = None) -> Method:
    """Describe the method of a run for the formulas.

    Args:
      model: The model.
      choices: Settings of the run.
      residuals: The result of `trace_residuals`.

    Raises:
      NoMatchError: A target matches no kernel of the model.
    """
    settings = choices.settings
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


def step_of(choices: Choices, length: int, targets: int, devices: int = 1) -> Step:
    """Describe a step on one of several devices that share a batch."""
    settings = choices.settings
    return Step(
        batch_size=settings.batch_size // devices,
        length=length,
        targets=targets,
        accumulation=settings.grad_accumulation_steps,
        remat=settings.remat_on(target_platform(())) == "full",
        loss_chunk=settings.loss_chunk,
    )


def why_not_compiled(model: PlannedModel, choices: Choices, length: int = 0) -> str:
    """Return why the step cannot be compiled, or an empty string if it can."""
    reasons = {
        "jax_lora does not implement this model": model.module is None,
        "train supports decoders only": not model.decodes,
        "the model has more than 1.5 G parameters": model.shape.size > COMPILE_UP_TO,
        f"the model has only {model.max_length} positions": length > model.max_length,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _flops(
    method: Method, choices: Choices, data: DataShapes, steps: int | None
) -> dict[str, float]:
    """Compute the operations of the run by method: the mean over an epoch times the steps."""
    batches = sum(shape.batches for shape in data.shapes)
    sums: dict[str, float] = {}
    for length, targets, count in data.shapes:
        for name, column in side_by_side(method, step_of(choices, length, targets)).items():
            sums[name] = sums.get(name, 0.0) + column.flops * count / batches
    return {name: mean * (steps or 1) for name, mean in sums.items()}


def matmul_rate(dtype: Any = jnp.float32) -> float:
    """Measure for 0.3 s how fast the default device multiplies square matrices.

    A training step is slower: norms, softmax and low-rank products are limited by memory bandwidth.

    Returns:
      Floating-point operations per second of the fastest product.
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
