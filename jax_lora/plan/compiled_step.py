"""Compile the training step of a run from shapes alone, and read its memory from XLA."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jax_lora.adapter import Adapter, combine, is_weight
from jax_lora.data.collators import Batch
from jax_lora.finetune.devices import data_mesh, make_mesh
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.state_sharding import state_shardings
from jax_lora.finetune.step import dropout_transform, init_state, make_step
from jax_lora.finetune.tasks import CAUSAL, depth_of, loss_for
from jax_lora.init import lora_init
from jax_lora.models.mesh_sharding import gather_codes, mesh_sharding, row_spec
from jax_lora.paths import flatten_with_paths
from jax_lora.plan.planned_model import PlannedModel
from jax_lora.quantize import QuantizedWeight, array_shardings, quantize
from jax_lora.sharding import adapter_shardings
from jax_lora.transform.strategies import target_platform


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Memory of a compiled step on one device, in bytes."""

    arguments: int  # base weights, adapter, optimizer state and batch
    results: int  # updated adapter and optimizer state, and the step's report
    reused: int  # the part of `results` that is written into the memory of donated arguments
    temporary: int  # activations, gradients and logits
    devices: int  # that run the step, each with this memory
    seconds: float  # to lower and compile

    @property
    def peak(self) -> int:
        """Peak memory of one device."""
        return self.arguments + self.results - self.reused + self.temporary

    @property
    def everywhere(self) -> int:
        """Peak memory of all devices together."""
        return self.peak * self.devices


def abstract_adapter(model: PlannedModel, settings: TrainSettings) -> Adapter:
    """Create the shapes of the adapter that `train` would create."""
    config = settings.lora_config(0 if model.module is None else depth_of(model.module))
    make = lambda key: lora_init(key, model.variables, config, kernels=model.kernels)  # noqa: E731
    return jax.eval_shape(make, jax.random.key(0))


def abstract_batch(settings: TrainSettings, length: int, targets: int) -> Batch:
    """Create the shapes of a batch with all its gradient accumulation steps."""
    examples = settings.batch_size * settings.grad_accumulation_steps

    def of(dtype: Any, size: int) -> Any:
        return jax.ShapeDtypeStruct((examples, size), dtype)

    return Batch(
        ids=of(jnp.int32, length),
        at=of(jnp.int32, targets),
        labels=of(jnp.int32, targets),
        weights=of(jnp.float32, targets),
        positions=of(jnp.int32, length) if settings.pack else None,
        segments=of(jnp.int32, length) if settings.pack else None,
    )


def trace_step(
    model: PlannedModel,
    settings: TrainSettings,
    *,
    length: int,
    targets: int,
    remat: str | None = None,
    devices: Sequence[Any] | None = None,
    platform: str | None = None,
) -> tuple[Any, int]:
    """Trace the training step for one batch shape, without allocating any array.

    `targets` counts the target tokens per example. Without `remat`, layers keep for the backward
    pass what the settings say. The step is for the devices of this machine, or for `devices` of a
    `platform` ("cpu", "gpu" or "tpu") that need not be here.

    Returns:
      The result of `jax.jit(...).trace`, and the number of devices that share the batch.
    """
    platform = platform or target_platform(())
    full = settings.fine_tune_type == "full"
    if full:
        frozen, trainable = {}, model.variables
    else:
        frozen, trainable = model.variables, abstract_adapter(model, settings)
        if settings.quantize != "none":
            frozen = quantize(frozen, settings.quantize, kernels=model.kernels)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((frozen, trainable))]
    mesh = make_mesh(settings.mesh, settings.batch_size, devices) or data_mesh(
        settings.batch_size, SimpleNamespace(nbytes=sum(sizes)), devices
    )
    optimizer = optimizer_of(settings)
    state = jax.eval_shape(lambda trainable: init_state(trainable, optimizer), trainable)
    frozen = _placed(frozen, mesh)
    of_trainable = (
        jax.tree.map(lambda leaf: leaf.sharding, _placed(trainable, mesh))
        if full
        else adapter_shardings(frozen, trainable)
    )
    shardings = state_shardings(state, of_trainable, mesh)
    step = make_step(
        loss_for(
            CAUSAL,
            model.module.clone(
                remat=remat or settings.remat_on(platform),
                attention=settings.attention,
                platform=platform,
                mesh=mesh,
            ),
            chunk=settings.loss_chunk,
            devices=mesh.size,
        ),
        optimizer,
        accumulation=settings.grad_accumulation_steps,
        transform=dropout_transform(settings.dropout, settings.seed),
        join=(lambda _, trainable: trainable) if full else combine,
        platform=platform,
        state_shardings=shardings,
    )
    batch = abstract_batch(settings, length, targets)
    split = jax.tree.map(lambda _: NamedSharding(mesh, row_spec(mesh)), batch)
    return step.trace(_on(state, shardings), frozen, _on(batch, split)), mesh.size


def step_memory(
    model: PlannedModel,
    settings: TrainSettings,
    *,
    length: int,
    targets: int,
    remat: str | None = None,
) -> StepMemory | None:
    """Compile the step that `trace_step` traces, and read its memory as `memory_of` does."""
    began = time.perf_counter()
    traced, devices = trace_step(model, settings, length=length, targets=targets, remat=remat)
    compiled = traced.lower().compile()
    return memory_of(compiled, devices, time.perf_counter() - began)


def fit_remat(
    model: PlannedModel, settings: TrainSettings, memory: float, *, length: int, targets: int
) -> str:
    """Return `"names"` if the compiled step fits into the memory of a device, else `"full"`.

    The compiled step is the one that training runs, so the compilation cache keeps it. `memory` is
    in bytes, `length` the longest sequence of a batch, `targets` the most target tokens of an
    example.
    """
    step = step_memory(model, settings, length=length, targets=targets, remat="names")
    return "names" if step is None or step.peak <= memory else "full"


def memory_of(compiled: Any, devices: int = 1, seconds: float = 0.0) -> StepMemory | None:
    """Read the memory of a compiled function, or None if the backend does not report it."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return StepMemory(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        reused=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        devices=devices,
        seconds=seconds,
    )


def optimizer_of(settings: TrainSettings) -> optax.GradientTransformation:
    """Create the optimizer of `train`, without its schedule, which changes no shape."""
    constant = dataclasses.replace(settings, lr_schedule="constant", warmup=0.0)
    return constant.make_optimizer(1)


def _placed(variables: Any, mesh: Mesh) -> Any:
    """Give every parameter its sharding on the mesh."""
    place = mesh_sharding(mesh)
    named, treedef = flatten_with_paths(variables, is_leaf=is_weight)
    leaves = [_leaf_on(leaf, place(path, leaf.shape)) for path, leaf in named]
    return gather_codes(jax.tree.unflatten(treedef, leaves), mesh)


def _leaf_on(leaf: Any, sharding: NamedSharding) -> Any:
    if not isinstance(leaf, QuantizedWeight):
        return _on(leaf, sharding)
    return dataclasses.replace(leaf, arrays=_on(leaf.arrays, array_shardings(leaf, sharding)))


def _on(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
