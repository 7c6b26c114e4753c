"""The program that is asked is the one that trains."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jax_lora.bundled import model_path
from jax_lora.data.batches import Batch
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.step import make_step, start
from jax_lora.plan.methods import estimate
from jax_lora.plan.planned_model import plan_folder
from jax_lora.plan.planning import Choices, method_of, work_of
from jax_lora.plan.program import (
    abstract_adapter,
    memory_of,
    optimizer_of,
    program_memory,
)
from jax_lora.plan.residuals import kept_by

SETTINGS = TrainSettings(rank=4, batch_size=1)


@pytest.mark.slow
def test_the_step_compiled_from_shapes_takes_what_the_step_on_arrays_takes(planned):
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)  # noqa: E731
    variables = jax.tree.map(zeros, planned.variables)
    adapter = jax.tree.map(zeros, abstract_adapter(planned, SETTINGS))
    optimizer = optimizer_of(SETTINGS)
    ids = jnp.zeros((1, 16), jnp.int32)
    batch = Batch(ids, ids, ids, jnp.ones((1, 16)))
    step = make_step(planned.module, optimizer)
    real = memory_of(step.lower(start(adapter, optimizer), variables, batch).compile())
    shapes = program_memory(planned, SETTINGS, length=16, learned=16)
    assert dataclasses.replace(shapes, seconds=0.0) == real


@pytest.mark.slow
def test_full_fine_tuning_takes_the_model_its_moments_and_no_adapter(planned):
    full = dataclasses.replace(SETTINGS, fine_tune_type="full")
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(planned.variables))
    taken = program_memory(planned, full, length=16, learned=16)
    # The model and two moments of its size, and a few numbers beside them.
    assert 3 * parameters <= taken.arguments < 3 * parameters + 1000


def test_the_adapter_is_the_one_that_training_would_make(planned):
    adapter = abstract_adapter(planned, SETTINGS)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(adapter.pairs))
    method = method_of(planned, Choices(SETTINGS))
    assert sum(kernel.pair_size(4) for kernel in method.adapted) == adapter.size == method.trained


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_the_formula_is_within_a_tenth_of_the_program_of_the_bundled_model(remat):
    model = plan_folder(model_path(), "float32")
    choices = Choices(TrainSettings(rank=32, batch_size=7), remat=remat)
    program = program_memory(model, choices.settings, length=256, learned=128, remat=remat)
    method = method_of(model, choices, kept_by(model, choices.settings))
    work = work_of(choices, 256, 128, program.devices)
    assert estimate(method, work).total == pytest.approx(program.peak, rel=0.1)
