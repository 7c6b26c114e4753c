"""Shapes are read without weights."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from jax_lora.bundled import model_path
from jax_lora.errors import ModelError
from jax_lora.models import load
from jax_lora.plan.planned_model import plan_folder, plan_shape
from jax_lora.plan.published import NAMES

# From the model cards.
COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
}


ONE_OF_A_FAMILY = ("gpt2", "llama-3-70b", "mixtral-8x7b", "qwen3-8b", "gemma-2-9b")
REST = [pytest.param(n, marks=pytest.mark.slow) for n in COUNTS if n not in ONE_OF_A_FAMILY]


@pytest.mark.parametrize("name", [*ONE_OF_A_FAMILY, *REST])
def test_published_shapes_have_the_published_number_of_parameters(name):
    assert plan_shape(name, None).shape.size == COUNTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*NAMES} - {*COUNTS}))
def test_every_name_has_a_shape(name):
    model = plan_shape(name, None)
    assert model.shape.size == sum(math.prod(x.shape) for x in jax.tree.leaves(model.variables))
    assert model.dtype == "bfloat16"


def test_a_token_uses_two_of_eight_experts():
    shape = plan_shape("mixtral-8x7b", None).shape
    experts = [kernel for kernel in shape.body if "experts" in kernel.path]
    assert experts and all(kernel.active * 4 == kernel.size for kernel in experts)
    assert shape.intermediate_size == 2 * 14336


def test_a_folder_gives_the_shapes_that_loading_gives():
    model = plan_folder(model_path(), jnp.float32)
    _, params = load(model_path(), jnp.float32)
    loaded = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    planned = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.variables["params"])
    assert planned == loaded
    assert plan_folder(model_path(), None).dtype == "bfloat16"


def test_a_config_file_is_enough(tmp_path):
    for name in ("config.json", "other.json"):
        (tmp_path / name).write_text((model_path() / "config.json").read_text())
    counts = {plan_shape(str(tmp_path / n), None).shape.size for n in ("", "other.json")}
    assert counts == {plan_folder(tmp_path, None).shape.size}


def test_an_unknown_name_suggests_similar_names():
    with pytest.raises(
        ModelError, match=r"--shape llama-2-8b\n[\s\S]*Choose llama-3-8b, llama-2-7b"
    ):
        plan_shape("llama-2-8b", None)


def test_a_file_of_an_unsupported_architecture_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ModelError, match="model_type 'mamba'[\\s\\S]*Supported are bert, gemma"):
        plan_shape(str(file), None)
