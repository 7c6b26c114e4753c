"""A plan combines model, data and settings."""

import dataclasses

import pytest

from jax_lora.errors import NoMatchError
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan import planning
from jax_lora.plan.data_shapes import BatchShape, DataShapes
from jax_lora.plan.planned_model import plan_shape
from jax_lora.plan.planning import make_plan

NO_DATA = DataShapes("none", (BatchShape(32, 32, 1),))
DATA = DataShapes("data", (BatchShape(16, 8, 3), BatchShape(64, 16, 1)), examples=30, tokens=500)


@pytest.fixture(autouse=True)
def no_traces(monkeypatch):
    monkeypatch.setattr(planning, "trace_residuals", lambda model, settings: None)


def with_type(settings, fine_tune_type):
    return dataclasses.replace(settings, fine_tune_type=fine_tune_type)


def plan_of(model, settings, data=NO_DATA):
    return make_plan(model, data, settings, compiling=False)


def test_memory_depends_on_the_largest_batch_and_time_on_the_mean_batch(planned, settings):
    plan = plan_of(planned, settings, DATA)
    assert plan.steps == 4
    largest = 4 * plan.columns["LoRA"].flops
    assert 0.25 * largest < plan.flops["LoRA"] < 0.5 * largest


def test_without_data_steps_are_those_of_the_settings(planned, settings):
    assert plan_of(planned, settings).steps is None
    asked = dataclasses.replace(settings, iters=7)
    one, seven = plan_of(planned, settings), plan_of(planned, asked)
    assert seven.steps == 7
    assert seven.flops["full"] == 7 * one.flops["full"]


def test_the_method_is_that_of_the_settings(planned, settings):
    assert plan_of(planned, with_type(settings, "full")).method.full
    assert not plan_of(planned, settings).method.full


def test_dora_magnitudes_are_counted(planned, settings):
    dora = plan_of(planned, with_type(settings, "dora"))
    outputs = sum(kernel.count * kernel.outputs for kernel in planned.shape.body)
    assert dora.method.trainable == plan_of(planned, settings).method.trainable + outputs


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt3-175b", "does not implement this model"),
        ("roberta-base", "training steps of decoders"),
        ("gpt2-xl", "more than 1.5 G parameters"),
    ],
)
def test_the_plan_has_the_reason_why_a_step_is_not_compiled(name, why):
    plan = make_plan(plan_shape(name, None), NO_DATA, TrainSettings())
    assert plan.compiled is None
    assert why in plan.why


def test_a_target_that_the_model_lacks_is_refused(planned):
    with pytest.raises(NoMatchError, match="no_such"):
        plan_of(planned, TrainSettings(targets="no_such"))


def test_the_process_does_not_count_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(planning, "target_platform", lambda leaves: "gpu")
    assert planning.process_memory() is None
