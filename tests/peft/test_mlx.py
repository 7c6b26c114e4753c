"""Adapters of mlx-lm and of loralib."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_lora as jl
from jax_lora.errors import AdapterFileError

from .peft_cases import FOLDERS, base_of, expected_of, load_case, logits_of

Q1 = "model.layers.1.self_attn.q_proj"


def test_an_adapter_for_mlx_is_written_and_read_again(tmp_path):
    model, variables, adapter = load_case("plain")
    jl.peft.save_mlx(tmp_path, adapter, names=model.hf_names)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "dropout": 0.0,
            "keys": ["self_attn.q_proj", "self_attn.v_proj"],
            "rank": 4,
            "scale": 1.5,
        },
        "num_layers": 2,
    }
    tensors = load_file(tmp_path / "adapters.safetensors")
    assert (tensors[f"{Q1}.lora_a"].shape, tensors[f"{Q1}.lora_b"].shape) == ((16, 4), (4, 32))
    again = jl.peft.load_mlx(tmp_path, variables, names=model.hf_names)
    jax.tree.map(np.testing.assert_array_equal, again.pairs, adapter.pairs)


def test_scales_that_differ_are_folded_for_mlx(tmp_path):
    model, variables, adapter = load_case("plain")
    path = "params/layers/attn/q_proj/kernel"
    pair = jl.LoraPair(**{**vars(adapter.pairs[path]), "scale": (1.5, 0.25)})
    changed = jl.Adapter({**adapter.pairs, path: pair}, {}, adapter.config)
    jl.peft.save_mlx(tmp_path, changed, names=model.hf_names)
    again = jl.peft.load_mlx(tmp_path, variables, names=model.hf_names)
    ids, _ = expected_of("plain")
    np.testing.assert_allclose(
        logits_of(model, jl.combine(variables, again), ids),
        logits_of(model, jl.combine(variables, changed), ids),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("dora", "a magnitude"),
        ("whole", "a fully trained leaf"),
        ("layers", "no update in this layer"),
        ("patterns", "mlx-lm supports only one rank"),
    ],
)
def test_an_adapter_that_mlx_does_not_support_is_refused_with_the_reason(case, reason, tmp_path):
    model, _, adapter = load_case(case)
    with pytest.raises(AdapterFileError, match=reason):
        jl.peft.save_mlx(tmp_path / "out", adapter, names=model.hf_names)
    assert not (tmp_path / "out").exists()


def test_one_message_lists_all_problems_of_an_mlx_adapter(tmp_path):
    model, variables, adapter = load_case("plain")
    jl.peft.save_mlx(tmp_path, adapter, names=model.hf_names)
    tensors = load_file(tmp_path / "adapters.safetensors")
    tensors[f"{Q1}.lora_b"] = np.ones((4, 3), np.float32)
    tensors["model.surprise.lora_a"] = np.ones((4, 3), np.float32)
    save_file(tensors, tmp_path / "adapters.safetensors")
    config = {"fine_tune_type": "dora", "lora_parameters": {"rank": 0, "scale": "x"}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError) as caught:
        jl.peft.load_mlx(tmp_path, variables, names=model.hf_names)
    for part in (
        f"wrong shape: {Q1} has (16, 4) and (4, 3), expected (16, r) and (r, 32)",
        "extra: model.surprise.lora_a (4, 3)",
        "fine_tune_type 'dora'",
        "lora_parameters.rank = 0: expected an integer",
        "lora_parameters.scale = 'x': expected a finite number",
    ):
        assert part in str(caught.value)


def test_a_loralib_checkpoint_has_the_same_factors_under_other_names(tmp_path):
    model, variables, adapter = load_case("plain")
    tensors = {
        name.replace("base_model.model.", "").removesuffix(".weight"): tensor
        for name, tensor in load_file(FOLDERS / "plain" / "adapter_model.safetensors").items()
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    file = tmp_path / "lora.safetensors"
    again = jl.peft.load_loralib(file, variables, names=model.hf_names, alpha=6)
    jax.tree.map(np.testing.assert_array_equal, again.pairs, adapter.pairs)


def test_one_message_lists_all_problems_of_a_loralib_checkpoint(tmp_path):
    model, variables = base_of("plain")
    wrong = {
        f"{Q1}.lora_A": np.ones((4, 15), np.float32),
        f"{Q1}.lora_B": np.ones((32, 4), np.float32),
        "model.layers.0.self_attn.q_proj.lora_A": np.ones((4, 16), np.float32),
        "other.weight": np.ones((4, 16), np.float32),
    }
    save_file(wrong, tmp_path / "lora.safetensors")
    with pytest.raises(AdapterFileError) as caught:
        jl.peft.load_loralib(
            tmp_path / "lora.safetensors", variables, names=model.hf_names, alpha=6
        )
    for part in (
        f"wrong shape: {Q1} has (4, 15) and (32, 4), expected (r, 16) and (32, r)",
        "missing: model.layers.0.self_attn.q_proj.lora_B",
        "extra: other.weight (4, 16)",
    ):
        assert part in str(caught.value)
