"""The very step that `train` runs, lowered and compiled from shapes, and what XLA says it takes.

All that a plan calls of the fine-tuning code is called here.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jax_lora.adapter import Adapter, combine
from jax_lora.data.batches import Batch
from jax_lora.dropout import dropout
from jax_lora.finetune.devices import data_mesh
from jax_lora.finetune.optimizer_factory import make_optimizer
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.step import make_step, start
from jax_lora.finetune.trainable import depth_of
from jax_lora.init import lora_init
from jax_lora.plan.planned_model import PlannedModel


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """What a compiled step takes on one device, in bytes.

    Args:
      arguments: Base, factors, moments and batch.
      results: New factors and moments, and the report.
      reused: Of the results, what lies in the memory of an argument.
      temporary: Activations, gradients, logits.
      devices: How many devices run it, each with this much.
      seconds: Time that lowering and compiling took.
    """

    arguments: int
    results: int
    reused: int
    temporary: int
    devices: int
    seconds: float

    @property
    def peak(self) -> int:
        """Add up what is there at once."""
        return self.arguments + self.results - self.reused + self.temporary

    @property
    def everywhere(self) -> int:
        """Add up all devices."""
        return self.peak * self.devices


def abstract_adapter(model: PlannedModel, settings: TrainSettings) -> Adapter:
    """Make the shapes of the adapter that `train` would make.

    Args:
      model: The model.
      settings: Rank and targets.

    Returns:
      An adapter of `jax.ShapeDtypeStruct`s.

    Raises:
      NoMatchError: A target that the model does not have.
    """
    config = settings.lora_config(0 if model.module is None else depth_of(model.module))
    make = lambda key: lora_init(key, model.variables, config, kernels=model.kernels)  # noqa: E731
    return jax.eval_shape(make, jax.random.key(0))


def compile_step(
    model: PlannedModel, settings: TrainSettings, *, length: int, learned: int, remat: bool = False
) -> Any:
    """Compile the step of one shape, without a single weight.

    Args:
      model: The model.
      settings: What `train` would be told.
      length: Tokens of a row.
      learned: Tokens of a row that are learned.
      remat: Whether activations are computed again in the backward pass.

    Returns:
      The compiled program, the devices that share it, and the seconds that it took.
    """
    began = time.perf_counter()
    full = settings.fine_tune_type == "full"
    frozen = {} if full else model.variables
    trained = model.variables if full else abstract_adapter(model, settings)
    optimizer = optimizer_of(settings)
    state = jax.eval_shape(lambda trained: start(trained, optimizer), trained)
    module = model.module.clone(remat=remat)
    step = make_step(
        module,
        optimizer,
        accumulation=settings.grad_accumulation_steps,
        wrap=_dropout(settings),
        join=(lambda _, trained: trained) if full else combine,
        chunk=settings.loss_chunk,
    )
    batch = abstract_batch(settings, length, learned)
    mesh = data_mesh(settings.batch_size, _WithBytes.of((frozen, trained)))
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    lowered = step.lower(_on(state, whole), _on(frozen, whole), _on(batch, rows))
    return lowered.compile(), mesh.size, time.perf_counter() - began


def program_memory(
    model: PlannedModel, settings: TrainSettings, *, length: int, learned: int, remat: bool = False
) -> ProgramMemory | None:
    """Compile the step and ask XLA for its memory.

    Args:
      model: The model.
      settings: What `train` would be told.
      length: Tokens of a row.
      learned: Tokens of a row that are learned.
      remat: Whether activations are computed again in the backward pass.

    Returns:
      The memory, or None where the backend does not say.
    """
    compiled, devices, seconds = compile_step(
        model, settings, length=length, learned=learned, remat=remat
    )
    return memory_of(compiled, devices, seconds)


def memory_of(compiled: Any, devices: int = 1, seconds: float = 0.0) -> ProgramMemory | None:
    """Read XLA's account of a compiled program, or None where it keeps none."""
    said = compiled.memory_analysis()
    if said is None:
        return None
    return ProgramMemory(
        arguments=said.argument_size_in_bytes,
        results=said.output_size_in_bytes,
        reused=said.alias_size_in_bytes,
        temporary=said.temp_size_in_bytes,
        devices=devices,
        seconds=seconds,
    )


def abstract_batch(settings: TrainSettings, length: int, learned: int) -> Batch:
    """Make the shapes of a batch, all parts of it."""
    rows = settings.batch_size * settings.grad_accumulation_steps

    def of(dtype: Any, columns: int) -> Any:
        return jax.ShapeDtypeStruct((rows, columns), dtype)

    return Batch(
        ids=of(jnp.int32, length),
        at=of(jnp.int32, learned),
        labels=of(jnp.int32, learned),
        weights=of(jnp.float32, learned),
    )


def optimizer_of(settings: TrainSettings) -> optax.GradientTransformation:
    """Make the optimizer that `train` would make; its rate changes no shape."""
    return make_optimizer(
        optax.constant_schedule(settings.learning_rate),
        name=settings.optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lora_plus_ratio=settings.lora_plus_ratio,
    )


def _dropout(settings: TrainSettings) -> Any:
    if settings.dropout == 0.0 or settings.fine_tune_type == "full":
        return None
    key = jax.random.key(settings.seed)
    return lambda combined, step: dropout(combined, jax.random.fold_in(key, step))


def _on(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


@dataclasses.dataclass(frozen=True)
class _WithBytes:
    """Stands for an array whose size is asked for."""

    nbytes: int

    @classmethod
    def of(cls, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: cls(math.prod(leaf.shape) * leaf.dtype.itemsize), tree)
