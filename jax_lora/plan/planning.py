"""plan: all of it put together, from settings to estimates."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.arithmetic import Kept, Work
from jax_lora.plan.data_shapes import DataShapes
from jax_lora.plan.methods import Estimate, Method, estimate, side_by_side
from jax_lora.plan.planned_model import PlannedModel
from jax_lora.plan.program import ProgramMemory, abstract_adapter, program_memory
from jax_lora.plan.residuals import kept_by

COMPILE_UP_TO = 1_000_000_000  # parameters; a larger model is planned by formula alone


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a run is to do, as far as it changes what the run takes.

    Args:
      settings: Those of `train`.
      method: `"lora"`, `"dora"` or `"full"`.
      optimizer: Its name.
      remat: Whether activations are computed again in the backward pass.
      quantize: `"none"`, `"int8"` or `"nf4"`.
    """

    settings: TrainSettings
    method: str = "lora"
    optimizer: str = "adamw"
    remat: bool = False
    quantize: str = "none"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes.

    Args:
      model: The model.
      data: The shapes of its batches.
      choices: What it is to do.
      trained: Numbers of the adapter.
      adapted: How many matrices get factors.
      columns: Estimates by formula, of the largest batch on one device.
      own: That of the method chosen.
      steps: Updates, or None without data.
      flops: Operations of the whole run, or of one step without data.
      program: What the compiled step takes, or None where it was not compiled.
      why: Why it was not.
    """

    model: PlannedModel
    data: DataShapes
    choices: Choices
    trained: int
    adapted: int
    columns: dict[str, Estimate]
    own: Estimate
    steps: int | None
    flops: dict[str, float]
    program: ProgramMemory | None
    why: str


def make_plan(
    model: PlannedModel, data: DataShapes, choices: Choices, *, compiling: bool = True
) -> Plan:
    """Plan a run.

    Args:
      model: Its shapes.
      data: The shapes of its batches.
      choices: What it is to do.
      compiling: Whether the step may be compiled.

    Returns:
      The plan.

    Raises:
      NoMatchError: A target that the model does not have.
    """
    method = method_of(model, choices, kept_by(model, choices.settings))
    columns = side_by_side(method, work_of(choices, *data.largest[:2]))
    steps = None if data.per_epoch is None else choices.settings.iterations(data.per_epoch)
    if steps is None:
        steps = choices.settings.iters
    why = why_not_compiled(model, choices) if compiling else "not asked for"
    program = None
    if not why:
        length, learned, _ = data.largest
        program = program_memory(
            model, choices.settings, length=length, learned=learned, remat=choices.remat
        )
        why = "" if program is not None else "this backend keeps no account of its memory"
    return Plan(
        model=model,
        data=data,
        choices=choices,
        trained=method.trained,
        adapted=sum(kernel.count for kernel in method.adapted),
        columns=columns,
        own=estimate(method, work_of(choices, *data.largest[:2])),
        steps=steps,
        flops=_flops(method, choices, data, steps),
        program=program,
        why=why,
    )


def method_of(model: PlannedModel, choices: Choices, kept: Kept | None = None) -> Method:
    """Describe the chosen way to train for the formulas.

    Args:
      model: The model.
      choices: What the run is to do.
      kept: What `kept_by` says of the model's activations.

    Returns:
      The method.

    Raises:
      NoMatchError: A target that the model does not have.
    """
    adapter = abstract_adapter(model, choices.settings)
    paths = {path.removeprefix("params/") for path in adapter.pairs}
    adapted = tuple(kernel for kernel in model.shape.kernels if kernel.path in paths)
    trained = adapter.size
    if choices.method == "dora" and not adapter.config.use_dora:
        trained += sum(kernel.count * kernel.outputs for kernel in adapted)
    return Method(
        shape=model.shape,
        adapted=adapted,
        rank=choices.settings.rank,
        trained=trained,
        number=jnp.dtype(model.dtype).itemsize,
        optimizer=choices.optimizer,
        full=choices.method == "full",
        quantize=choices.quantize,
        kept=kept,
    )


def work_of(choices: Choices, length: int, learned: int, devices: int = 1) -> Work:
    """Describe a step on one of several devices that share its rows."""
    settings = choices.settings
    return Work(
        rows=settings.batch_size // devices,
        length=length,
        learned=learned,
        parts=settings.grad_accumulation_steps,
        remat=choices.remat,
        loss_chunk=settings.loss_chunk,
    )


def why_not_compiled(model: PlannedModel, choices: Choices) -> str:
    """Say why the step is not compiled; nothing if it can be."""
    if model.module is None:
        return "there is no code for this model"
    if not model.decodes:
        return "train takes decoders only"
    if model.shape.size > COMPILE_UP_TO:
        return "the model has more than 1 G parameters"
    if choices.quantize != "none":
        return "training on a quantized base is no mode of this command yet"
    return ""


def _flops(
    method: Method, choices: Choices, data: DataShapes, steps: int | None
) -> dict[str, float]:
    """Operations of the run by column: the mean step of an epoch, times the steps."""
    batches = sum(shape.batches for shape in data.shapes)
    sums: dict[str, float] = {}
    for length, learned, count in data.shapes:
        for name, column in side_by_side(method, work_of(choices, length, learned)).items():
            sums[name] = sums.get(name, 0.0) + column.flops * count / batches
    return {name: mean * (steps or 1) for name, mean in sums.items()}
