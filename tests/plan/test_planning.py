"""A plan is put together of the right parts."""

import dataclasses

import pytest

from jax_lora.errors import NoMatchError
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan import planning
from jax_lora.plan.data_shapes import BatchShape, DataShapes
from jax_lora.plan.planned_model import plan_shape
from jax_lora.plan.planning import Choices, make_plan

NO_ROWS = DataShapes("none", (BatchShape(32, 32, 1),))
ROWS = DataShapes("rows", (BatchShape(16, 8, 3), BatchShape(64, 16, 1)), rows=30, tokens=500)


@pytest.fixture(autouse=True)
def no_traces(monkeypatch):
    monkeypatch.setattr(planning, "kept_by", lambda model, settings: None)


def plan_of(model, choices, data=NO_ROWS):
    return make_plan(model, data, choices, compiling=False)


def test_the_largest_batch_decides_on_memory_and_the_mean_one_on_time(planned, choices):
    plan = plan_of(planned, choices, ROWS)
    assert plan.steps == 4
    largest = 4 * plan.columns["LoRA"].flops
    assert 0.25 * largest < plan.flops["LoRA"] < 0.5 * largest


def test_steps_without_rows_are_those_asked_for(planned, choices):
    assert plan_of(planned, choices).steps is None
    asked = dataclasses.replace(choices, settings=dataclasses.replace(choices.settings, iters=7))
    one, seven = plan_of(planned, choices), plan_of(planned, asked)
    assert seven.steps == 7
    assert seven.flops["full"] == 7 * one.flops["full"]


def test_the_own_column_is_that_of_the_method(planned, choices):
    full = plan_of(planned, dataclasses.replace(choices, method="full"))
    assert full.own == full.columns["full"]
    assert plan_of(planned, choices).own == full.columns["LoRA"]
    quantized = plan_of(planned, dataclasses.replace(choices, quantize="nf4"))
    assert quantized.own == full.columns["LoRA, NF4"]


def test_magnitudes_of_dora_are_counted(planned, choices):
    dora = plan_of(planned, dataclasses.replace(choices, method="dora"))
    outputs = sum(kernel.count * kernel.outputs for kernel in planned.shape.body)
    assert dora.trained == plan_of(planned, choices).trained + outputs


@pytest.mark.parametrize(
    ("name", "choice", "why"),
    [
        ("gpt3-175b", {}, "no code for this model"),
        ("roberta-base", {}, "decoders only"),
        ("gpt2-xl", {}, "more than 1 G parameters"),
        ("gpt2", {"quantize": "int8"}, "no mode of this command yet"),
    ],
)
def test_it_is_said_why_a_step_is_not_compiled(name, choice, why):
    plan = make_plan(plan_shape(name, None), NO_ROWS, Choices(TrainSettings(), **choice))
    assert plan.program is None
    assert why in plan.why


def test_a_target_that_the_model_lacks_is_refused(planned):
    with pytest.raises(NoMatchError, match="no_such"):
        plan_of(planned, Choices(TrainSettings(targets="no_such")))
