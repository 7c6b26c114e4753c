"""Files for vLLM: one rank, one scale, modules only."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_lora as jl
from jax_lora.errors import AdapterFileError

from .peft_cases import expected_of, load_case, logits_of


@pytest.mark.parametrize("case", ["patterns", "all_linear_rslora", "layers"])
def test_scales_are_folded_and_ranks_are_one(case, tmp_path):
    model, variables, adapter = load_case(case)
    jl.peft.save(tmp_path, adapter, names=model.hf_names, target="vllm")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (config["r"], False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    ranks = {
        tensor.shape[0]
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
        if name.endswith("lora_A.weight")
    }
    assert ranks == {config["r"]}
    again = jl.peft.load(tmp_path, variables, names=model.hf_names)
    ids, expected = expected_of(case)
    logits = logits_of(model, jl.combine(variables, again), ids)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("dora", "a magnitude (DoRA)"),
        ("lora_bias", "a bias of B"),
        ("whole", "params/lm_head/kernel: a fully trained leaf"),
        ("bias_all", "bias: a fully trained leaf"),
        ("tokens", "trained rows"),
        ("experts", "a parameter of a module with several parameters"),
    ],
)
def test_an_adapter_that_vllm_does_not_support_is_refused_with_the_reason(case, reason, tmp_path):
    model, _, adapter = load_case(case)
    with pytest.raises(AdapterFileError, match="Serve the merged model") as caught:
        jl.peft.save(tmp_path / "out", adapter, names=model.hf_names, target="vllm")
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()
