"""Mixtral and Qwen3-MoE: the parameters of all experts in the files."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_lora.models import Mixtral, MixtralConfig, Qwen3MoE, Qwen3MoEConfig, load

FIXTURES = Path(__file__).parent.parent / "fixtures"
MIXTRAL = ("mixtral", "block_sparse_moe", ("w1", "w3", "w2"))
QWEN = ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj"))


@pytest.mark.parametrize(("family", "part", "names"), [MIXTRAL, QWEN], ids=["mixtral", "qwen"])
def test_the_kernels_of_one_expert_stand_at_its_place_in_the_stack(family, part, names):
    _, params = load(FIXTURES / family / "tied")
    stored = load_file(FIXTURES / family / "tied" / "model.safetensors")
    prefix = f"model.layers.1.{part}.experts.2"
    gate, up, down = (stored[f"{prefix}.{name}.weight"].T for name in names)
    experts = params["layers"]["mlp"]["experts"]
    np.testing.assert_array_equal(experts["gate_up_proj"][1, 2], np.hstack([gate, up]))
    np.testing.assert_array_equal(experts["down_proj"][1, 2], down)


@pytest.mark.parametrize("model", [Mixtral(MixtralConfig()), Qwen3MoE(Qwen3MoEConfig())])
def test_adapters_name_routers_and_experts_as_parameters(model):
    names = {path: name for path, name in model.hf_names.items() if "/mlp/" in path}
    assert names == {
        "layers/mlp/gate/kernel": "model.layers.{layer}.mlp.gate.weight",
        "layers/mlp/experts/gate_up_proj": "model.layers.{layer}.mlp.experts.gate_up_proj",
        "layers/mlp/experts/down_proj": "model.layers.{layer}.mlp.experts.down_proj",
    }


def test_defaults_are_those_of_the_published_models():
    assert (MixtralConfig().num_local_experts, MixtralConfig().window) == (8, None)
    assert (Qwen3MoEConfig().num_experts, Qwen3MoEConfig().window) == (128, None)
