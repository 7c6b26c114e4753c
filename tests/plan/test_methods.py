"""Estimates of every fine-tuning method, side by side."""

import pytest

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.methods import side_by_side
from jax_lora.plan.planned_model import plan_shape
from jax_lora.plan.planning import method_of, step_of


@pytest.fixture(scope="module")
def columns():
    model = plan_shape("llama-2-7b", None)
    settings = TrainSettings(rank=16, batch_size=1)
    return side_by_side(method_of(model, settings), step_of(settings, 512, 512))


def test_weights_shrink_from_16_to_8_to_4_bits(columns):
    full, lora, int8, nf4 = (column.weights for column in columns.values())
    assert full == lora == 2 * 6_738_415_616
    assert int8 / lora == pytest.approx(0.52, abs=0.01)  # embedding and head stay in 16 bits
    assert nf4 / lora == pytest.approx(0.287, abs=0.01)


def test_only_trainable_parameters_have_gradients_and_optimizer_state(columns):
    full, lora = columns["full"], columns["LoRA"]
    assert full.trainable == 6_738_415_616
    assert lora.trainable == 39_976_960  # 32 layers of 7 kernels at rank 16
    assert (full.gradients, full.optimizer_state, full.adapter) == (
        full.weights,
        2 * full.weights,
        0,
    )
    assert (lora.gradients, lora.optimizer_state) == (lora.adapter, 2 * lora.adapter)


def test_a_lora_step_needs_about_two_thirds_of_the_operations(columns):
    assert 0.66 < columns["LoRA"].flops / columns["full"].flops < 0.72


def test_the_total_is_the_sum(columns):
    for column in columns.values():
        parts = column.as_dict()
        total = parts.pop("total")
        del parts["trainable"], parts["flops"]
        assert total == sum(parts.values())
