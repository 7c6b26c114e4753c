"""Traced residuals agree with the formula for a Llama, and cover what the formula does not."""

import dataclasses

import pytest

from jax_lora.errors import ModelError
from jax_lora.finetune.settings import TrainSettings
from jax_lora.models import LlamaConfig
from jax_lora.models.t5 import T5Config
from jax_lora.plan.arithmetic import Step, activation_bytes
from jax_lora.plan.planned_model import plan_config, plan_shape
from jax_lora.plan.residuals import trace_residuals

SETTINGS = TrainSettings(rank=4)
LLAMA = LlamaConfig(
    vocab_size=1000, hidden_size=192, intermediate_size=512, num_hidden_layers=12,
    num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", [False, True])
def test_a_llama_has_the_residuals_of_the_formula(dtype, remat):
    model = plan_config(LLAMA, dtype, "llama")
    step = Step(batch_size=2, length=300, targets=300, remat=remat)
    itemsize = 4 if dtype == "float32" else 2
    formula = activation_bytes(model.shape, step, itemsize, rank=4, pairs=7)
    traced = activation_bytes(
        model.shape, step, itemsize, residuals=trace_residuals(model, SETTINGS)
    )
    assert traced == pytest.approx(formula, rel=0.15 if remat else 0.1)


def test_residuals_grow_with_the_layers_and_contain_no_weights():
    twice = dataclasses.replace(LLAMA, num_hidden_layers=24)
    one, two = (
        trace_residuals(plan_config(each, "float32", ""), SETTINGS) for each in (LLAMA, twice)
    )
    assert two.fixed / one.fixed == pytest.approx(2, rel=0.05)
    assert two.by_length / one.by_length == pytest.approx(2, rel=0.05)


def test_capped_scores_have_more_residuals_than_plain_scores():
    gemma, llama = (
        trace_residuals(plan_shape(n, None), SETTINGS) for n in ("gemma-2-9b", "llama-3-8b")
    )
    assert gemma.by_length / (42 * 16) > llama.by_length / (32 * 32)


def test_only_decoders_are_traced():
    assert trace_residuals(plan_shape("roberta-base", None), SETTINGS) is None
    assert trace_residuals(plan_shape("gpt3-175b", None), SETTINGS) is None


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ModelError, match="an encoder-decoder"):
        plan_config(T5Config(), "float32", "t5")
