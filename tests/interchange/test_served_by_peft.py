"""Train an adapter, export it, load it with PEFT, and compare the outputs.

Runs where torch, transformers and peft are installed beside the package:

    pip install torch transformers peft
    python -m pytest tests/interchange
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.bundled import model_path
from jax_lora.cli import main

# The imported extensions emit warnings.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, so that greedy choices are far from ties
}
WINDOWS = {"sliding_window": 8}
EXPERTS = {"num_experts_per_tok": 2}
FAMILIES = {
    "Llama": {},
    "Mistral": WINDOWS,
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {**WINDOWS, "query_pre_attn_scalar": 8},
    "Gemma3": {**WINDOWS, "query_pre_attn_scalar": 8},
    "Phi3": {"pad_token_id": 0},
    "GPT2": {},
    "Mixtral": {**EXPERTS, "num_local_experts": 4},
    "SmolLM3": {},
    "Olmo2": {},
    "Granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "SeedOss": {},
    "Qwen3Moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24},
}
ROWS = [{"prompt": f"count to {n}", "completion": f" {list(range(n))}"} for n in range(1, 13)]


def make_folder(family, folder):
    """A folder as transformers saves it, with the bundled model's tokenizer."""
    settings = {**COMMON, **FAMILIES[family]}
    if family in ("Phi3", "Qwen2", "Olmo2", "Granite"):
        del settings["head_dim"]
    if family == "GPT2":
        settings = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
    bundled = json.loads((model_path() / "config.json").read_text())
    ends = {name: bundled[name] for name in ("bos_token_id", "eos_token_id")}
    name = "Gemma3Text" if family == "Gemma3" else family
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(**{**ends, **settings}, vocab_size=bundled["vocab_size"])
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")
    model(config).save_pretrained(folder)
    for file in model_path().glob("tokenizer*"):
        shutil.copy(file, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_logits_and_the_text_of_the_exported_adapter(
    family, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_folder(family, tmp_path / "base")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to its integer step count
        options = ["--iters", "8", "--rank", "4", "--learning-rate", "0.02", "--batch-size", "4"]
        places = ["--data", "data.jsonl", "--adapter-path", "run", "--progress", "none"]
        assert main(["train", "base", *places, *options]) == 0
        assert main(["export", "--adapter-path", "run", "--to", "peft", "served"]) == 0

    model, params = jl.models.load("base", dtype=jnp.float32)
    adapter = jl.peft.load("served", {"params": params}, names=model.hf_names)
    merged = jl.merge({"params": params}, adapter)
    base = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    served = peft.PeftModel.from_pretrained(base, "served").eval()

    ids = np.random.default_rng(0).integers(3, 500, (2, 12))
    ours = jax.jit(model.apply)(merged, jnp.asarray(ids, jnp.int32))
    with torch.no_grad():
        theirs = served(input_ids=torch.tensor(ids)).logits.numpy()
        plain = served.base_model.model  # the same modules: the adapter is in them
        with served.disable_adapter():
            without = served(input_ids=torch.tensor(ids)).logits.numpy()
    assert np.abs(theirs - without).max() > 1e-2, "the adapter has to matter"
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)

    with torch.no_grad():
        theirs = plain.generate(
            torch.tensor(ids), do_sample=False, max_new_tokens=12, min_new_tokens=12, use_cache=True
        ).numpy()
    known = jnp.asarray(np.pad(ids, ((0, 0), (0, 12))), jnp.int32)
    apply = jax.jit(lambda ids: model.apply(merged, ids))
    for place in range(12, 24):
        logits = apply(known)[:, place - 1]
        logits = logits.at[:, jnp.array(served.generation_config.eos_token_id)].set(-jnp.inf)
        known = known.at[:, place].set(logits.argmax(-1).astype(jnp.int32))
    np.testing.assert_array_equal(known, theirs)
