"""What a trace says is kept is what the formula counts, where the formula knows the model."""

import dataclasses

import pytest

from jax_lora.errors import ModelError
from jax_lora.finetune.settings import TrainSettings
from jax_lora.models import LlamaConfig
from jax_lora.models.t5 import T5Config
from jax_lora.plan.arithmetic import Work, activation_bytes
from jax_lora.plan.planned_model import of_config, plan_shape
from jax_lora.plan.residuals import kept_by

SETTINGS = TrainSettings(rank=4)
LLAMA = LlamaConfig(
    vocab_size=1000, hidden_size=192, intermediate_size=512, num_hidden_layers=12,
    num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", [False, True])
def test_a_llama_keeps_what_the_formula_says(dtype, remat):
    model = of_config(LLAMA, dtype, "llama")
    work = Work(rows=2, length=300, learned=300, remat=remat)
    number = 4 if dtype == "float32" else 2
    formula = activation_bytes(model.shape, work, number, rank=4, pairs=7)
    traced = activation_bytes(model.shape, work, number, kept=kept_by(model, SETTINGS))
    assert traced == pytest.approx(formula, rel=0.15 if remat else 0.1)


def test_it_grows_with_the_number_of_layers_and_no_weights_are_in_it():
    twice = dataclasses.replace(LLAMA, num_hidden_layers=24)
    one, two = (kept_by(of_config(each, "float32", ""), SETTINGS) for each in (LLAMA, twice))
    assert two.fixed / one.fixed == pytest.approx(2, rel=0.05)
    assert two.by_length / one.by_length == pytest.approx(2, rel=0.05)


def test_capped_scores_are_kept_more_often_than_plain_ones():
    gemma, llama = (kept_by(plan_shape(n, None), SETTINGS) for n in ("gemma-2-9b", "llama-3-8b"))
    assert gemma.by_length / (42 * 16) > llama.by_length / (32 * 32)


def test_only_decoders_are_traced():
    assert kept_by(plan_shape("roberta-base", None), SETTINGS) is None
    assert kept_by(plan_shape("gpt3-175b", None), SETTINGS) is None


def test_a_model_of_two_stacks_is_refused():
    with pytest.raises(ModelError, match="a model of two stacks"):
        of_config(T5Config(), "float32", "t5")
