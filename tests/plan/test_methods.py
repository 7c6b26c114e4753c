"""What each way to train takes, next to the others."""

import pytest

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.methods import side_by_side
from jax_lora.plan.planned_model import plan_shape
from jax_lora.plan.planning import Choices, method_of, work_of


@pytest.fixture(scope="module")
def columns():
    model = plan_shape("llama-2-7b", None)
    choices = Choices(TrainSettings(rank=16, batch_size=1))
    return side_by_side(method_of(model, choices), work_of(choices, 512, 512))


def test_weights_shrink_from_16_to_8_to_4_bits(columns):
    full, lora, int8, nf4 = (column.weights for column in columns.values())
    assert full == lora == 2 * 6_738_415_616
    assert int8 / lora == pytest.approx(0.52, abs=0.01)  # tables and head stay in 16 bits
    assert nf4 / lora == pytest.approx(0.287, abs=0.01)


def test_only_what_is_trained_has_gradients_and_moments(columns):
    full, lora = columns["full"], columns["LoRA"]
    assert full.trained == 6_738_415_616
    assert lora.trained == 39_976_960  # 32 layers of 7 kernels at rank 16
    assert (full.gradients, full.moments, full.adapter) == (full.weights, 2 * full.weights, 0)
    assert (lora.gradients, lora.moments) == (lora.adapter, 2 * lora.adapter)


def test_a_step_of_lora_takes_about_two_thirds_of_the_operations(columns):
    assert 0.66 < columns["LoRA"].flops / columns["full"].flops < 0.72


def test_the_total_is_the_sum(columns):
    for column in columns.values():
        parts = column.as_dict()
        total = parts.pop("total")
        del parts["trained"], parts["flops"]
        assert total == sum(parts.values())
