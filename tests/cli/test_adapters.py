import jax
import pytest

import jax_lora as jl
from jax_lora.cli.adapters import find_checkpoint_and_config, read_adapter
from jax_lora.cli.base_model import load_base
from jax_lora.errors import ConfigError


def test_an_adapter_of_peft_for_a_changed_base_names_the_import(model_folder, tmp_path):
    base = load_base(str(model_folder))
    untied, params = jl.models.untie(base.model, base.variables["params"])
    config = jl.LoraConfig(rank=2, targets=["lm_head"])
    adapter = jl.lora_init(jax.random.key(0), {"lm_head": params["lm_head"]}, config)
    jl.peft.save(tmp_path, adapter, names=untied.hf_names)
    with pytest.raises(ConfigError, match=f"jax-lora import --adapter-path {tmp_path} --model"):
        read_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("base_model", "revision", "model"),
    [
        ("owner/name", "v1", "owner/name@v1"),
        ("owner/name", None, "owner/name"),
        ("/path/to/model", None, "/path/to/model"),
        (None, None, None),
    ],
)
def test_an_adapter_of_peft_names_its_base_model(tmp_path, base_model, revision, model):
    tree = {"q_proj": {"kernel": jax.numpy.zeros((4, 4))}}
    adapter = jl.lora_init(jax.random.key(0), tree, jl.LoraConfig(rank=2))
    names = {"q_proj/kernel": "q_proj"}
    jl.peft.save(tmp_path, adapter, names=names, base_model=base_model, revision=revision)
    assert find_checkpoint_and_config(str(tmp_path)) == (
        tmp_path,
        {} if model is None else {"model": model},
    )
