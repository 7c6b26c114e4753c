"""The planned step is equal to the step of a training run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jax_lora.bundled import model_path
from jax_lora.data.collators import Batch
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.step import init_state, make_step
from jax_lora.finetune.tasks import CAUSAL, loss_for
from jax_lora.plan.compiled_step import (
    abstract_adapter,
    fit_remat,
    memory_of,
    optimizer_of,
    step_memory,
)
from jax_lora.plan.methods import estimate
from jax_lora.plan.planned_model import plan_folder
from jax_lora.plan.planning import method_of, step_of
from jax_lora.plan.residuals import trace_residuals

SETTINGS = TrainSettings(rank=4, batch_size=1)


@pytest.mark.slow
def test_the_step_compiled_from_shapes_needs_the_memory_of_the_step_on_arrays(planned):
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)  # noqa: E731
    variables = jax.tree.map(zeros, planned.variables)
    adapter = jax.tree.map(zeros, abstract_adapter(planned, SETTINGS))
    optimizer = optimizer_of(SETTINGS)
    ids = jnp.zeros((1, 16), jnp.int32)
    batch = Batch(ids, ids, ids, jnp.ones((1, 16)))
    step = make_step(loss_for(CAUSAL, planned.module), optimizer)
    real = memory_of(step.lower(init_state(adapter, optimizer), variables, batch).compile())
    shapes = step_memory(planned, SETTINGS, length=16, targets=16)
    assert dataclasses.replace(shapes, seconds=0.0) == real


@pytest.mark.slow
def test_full_fine_tuning_needs_the_model_and_its_optimizer_state(planned):
    full = dataclasses.replace(SETTINGS, fine_tune_type="full")
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(planned.variables))
    memory = step_memory(planned, full, length=16, targets=16)
    # The model, AdamW state of twice its size, and a few scalars.
    assert 3 * parameters <= memory.arguments < 3 * parameters + 1000


def test_the_adapter_is_that_of_training(planned):
    adapter = abstract_adapter(planned, SETTINGS)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(adapter.pairs))
    method = method_of(planned, SETTINGS)
    assert sum(kernel.pair_size(4) for kernel in method.adapted) == adapter.size == method.trainable


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_the_formula_is_within_a_tenth_of_the_compiled_step_of_the_bundled_model(remat):
    model = plan_folder(model_path(), "float32")
    settings = TrainSettings(rank=32, batch_size=7, grad_checkpoint=remat)
    compiled = step_memory(model, settings, length=256, targets=128)
    method = method_of(model, settings, trace_residuals(model, settings))
    step = step_of(settings, 256, 128, compiled.devices)
    assert estimate(method, step).total == pytest.approx(compiled.peak, rel=0.1)


@pytest.mark.slow
def test_whole_layers_are_recomputed_only_if_the_step_does_not_fit(planned):
    settings = TrainSettings(rank=4, batch_size=1, attention="flash")
    shape = {"length": 64, "targets": 8}
    names = step_memory(planned, settings, remat="names", **shape)
    assert names is not None
    assert fit_remat(planned, settings, names.peak, **shape) == "names"
    assert fit_remat(planned, settings, names.peak - 1, **shape) == "full"
