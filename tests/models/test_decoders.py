"""Tests of all decoder families: PyTorch's logits, files, cache, adapters, errors."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

import jax_lora as jl
from jax_lora.errors import ModelError
from jax_lora.models import generate, load, save
from tests.lora_cases import assert_close, merged_tree

FIXTURES = Path(__file__).parent.parent / "fixtures"
# Family -> the variant with the most to it, and how many kernels "all-linear" adapts.
FAMILIES = {
    "gemma": ("tied", 7),
    "gemma2": ("capped", 7),
    "gemma3": ("published", 7),
    "gemma3_text": ("mixed", 7),
    "gpt2": ("scaled", 4),
    "granite": ("tied", 7),
    "ministral3": ("untied", 7),
    "mistral": ("window", 7),
    "mistral3": ("ministral", 7),
    "mixtral": ("tied", 6),  # four of attention, two of the experts
    "olmo2": ("untied", 7),
    "phi3": ("window", 4),
    "qwen2": ("mixed", 7),
    "qwen3": ("mixed", 7),
    "qwen3_moe": ("tied", 6),
    "seed_oss": ("published", 7),
    "smollm3": ("window", 7),
}
TEXT_PARTS = ("gemma3", "mistral3")  # of models with a vision tower
THOROUGH = (*TEXT_PARTS, "granite", "ministral3", "olmo2", "seed_oss", "smollm3")
EVERY = [
    pytest.param(family, folder.name, id=f"{family}-{folder.name}")
    for family in FAMILIES
    for folder in sorted((FIXTURES / family).iterdir())
]
COMPLETE = [each for each in EVERY if each.values[0] not in TEXT_PARTS]
RICHEST = [pytest.param(family, variant, id=family) for family, (variant, _) in FAMILIES.items()]


def slow_unless(params, fast):
    """The same parameters, marked slow where `fast` of family and variant is false."""
    return [
        each
        if fast(*each.values)
        else pytest.param(*each.values, id=each.id, marks=pytest.mark.slow)
        for each in params
    ]


RICHEST_FIRST = slow_unless(EVERY, lambda family, variant: FAMILIES[family][0] == variant)
# A continuation of the thorough families reads their caches too.
RICHEST_CACHES = slow_unless(RICHEST, lambda family, _: family not in THOROUGH)
THREE_KINDS = slow_unless(RICHEST, lambda family, _: family in ("gemma3_text", "gpt2", "mixtral"))


@functools.cache
def loaded(family: str, variant: str):
    return load(FIXTURES / family / variant)


def batch(family: str, variant: str):
    """Ids, mask, PyTorch's logits, and where they mean something: not at padding."""
    stored = load_file(FIXTURES / family / variant / "expected.safetensors")
    ids, mask = (jnp.asarray(stored[k].astype(np.int32)) for k in ("input_ids", "attention_mask"))
    return ids, mask, stored["logits"], np.asarray(mask, bool)


@pytest.mark.parametrize(("family", "variant"), RICHEST_FIRST)
def test_logits_equal_pytorch_on_full_left_and_right_padded_rows(family, variant):
    model, params = loaded(family, variant)
    ids, mask, expected, real = batch(family, variant)
    logits = jax.jit(model.apply)({"params": params}, ids, attention_mask=mask)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)
    assert np.isfinite(logits).all()  # at padding too, or gradients would not be


@pytest.mark.parametrize(("family", "variant"), EVERY)
def test_saving_a_loaded_model_reproduces_its_files(family, variant, tmp_path):
    folder = FIXTURES / family / variant
    save(tmp_path, *loaded(family, variant))
    assert (tmp_path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    if (folder / "model.safetensors").exists():
        written, stored = (each / "model.safetensors" for each in (tmp_path, folder))
        assert written.read_bytes() == stored.read_bytes()
        return
    stored = {k: v for file in folder.glob("model-*") for k, v in load_file(file).items()}
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        assert (written[name].dtype, written[name].tobytes()) == (tensor.dtype, tensor.tobytes())


@pytest.mark.parametrize(("family", "variant"), COMPLETE)
def test_a_configuration_written_anew_reads_as_the_old_one(family, variant, tmp_path):
    model, params = loaded(family, variant)
    unsourced = model.clone(config=dataclasses.replace(model.config, source=""))
    save(tmp_path, unsourced, params)
    assert load(tmp_path)[0] == model
    transformers = pytest.importorskip("transformers")
    ours = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    theirs = transformers.AutoConfig.from_pretrained(FIXTURES / family / variant).to_dict()
    for key in set(theirs) - {"transformers_version", "_name_or_path"}:
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize(("family", "variant"), RICHEST_CACHES)
def test_tokens_three_at_a_time_through_a_cache_get_pytorch_logits(family, variant):
    model, params = loaded(family, variant)
    ids, mask, expected, real = batch(family, variant)
    apply, cache, parts = jax.jit(model.apply), model.init_cache(3, 12), []
    for i in range(0, 12, 3):
        few = ids[:, i : i + 3]
        logits, cache = apply({"params": params}, few, attention_mask=mask, cache=cache)
        parts.append(logits)
    logits = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", THOROUGH)
def test_packed_documents_continuations_and_an_adapter_of_peft_equal_pytorch(family, tmp_path):
    variant, count = FAMILIES[family]
    folder = FIXTURES / family / variant
    (model, params), stored = loaded(family, variant), load_file(folder / "expected.safetensors")
    ids, segments, prompts, mask = (
        jnp.asarray(stored[name].astype(np.int32))
        for name in ("input_ids", "segment_ids", "prompts", "prompts_mask")
    )
    positions = jnp.arange(ids.shape[1])[None] - jnp.array([[0] * 5 + [5] * 4 + [9] * 3])
    packed = {"positions": positions, "segment_ids": segments}
    logits = jax.jit(model.apply)({"params": params}, ids[:1], **packed)
    np.testing.assert_allclose(logits, stored["packed_logits"], atol=1e-4)
    made, _ = generate(model, params, prompts, mask, max_new_tokens=8)
    np.testing.assert_array_equal(made, stored["continued"])

    adapter = jl.peft.load(folder / "adapter", params, names=model.hf_names, dtype=None)
    assert len(adapter.pairs) == count
    logits = jax.jit(model.apply)({"params": jl.merge(params, adapter)}, ids[:1])
    np.testing.assert_allclose(logits, stored["adapted_logits"], atol=1e-4)
    jl.peft.save(tmp_path, adapter, names=model.hf_names, base=params)
    written = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert written == (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("family", "variant"), THREE_KINDS)
def test_every_kernel_is_found_named_and_adapted_and_merging_changes_nothing(family, variant):
    model, params = loaded(family, variant)
    variables, ids = {"params": params}, batch(family, variant)[0][:1, :3]
    kernels = jl.find_kernels(model.apply, variables, ids)
    named = [path for path in model.hf_names if not path.endswith("/scale")]
    assert set(kernels) == {f"params/{path}" for path in named}
    config = jl.LoraConfig(rank=2, alpha=4.0, targets="all-linear")

    @jax.jit
    def run(variables):
        adapter = jl.lora_init(jax.random.key(0), variables, config, kernels=kernels)
        assert len(adapter.pairs) == FAMILIES[family][1]
        adapter = jax.tree.map(lambda x: x + 0.1, adapter)  # no B of zeros
        apply = jl.lora_apply(model.apply, on_materialize="error")
        factored = apply(jl.combine(variables, adapter), ids)
        merged = merged_tree(variables, adapter)
        return (jl.merge(variables, adapter), merged), factored, model.apply(merged, ids)

    trees, factored, merged = run(variables)
    assert_close(*trees, 1e-5)
    np.testing.assert_allclose(factored, merged, atol=1e-4)
    assert np.abs(merged - batch(family, variant)[2][:1, :3]).max() > 0.1  # it is not the base


@pytest.mark.parametrize(("family", "variant"), RICHEST)
def test_init_makes_the_parameters_of_the_checkpoint(family, variant):
    model, params = loaded(family, variant)
    ids = jnp.zeros((1, 4), jnp.int32)
    made = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), ids)["params"], sep="/")
    have = flatten_dict(params, sep="/")
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in have.items()}


@pytest.mark.parametrize(("family", "variant"), RICHEST)
def test_arithmetic_stays_in_bfloat16_with_remat_and_cache_too(family, variant):
    model, params = loaded(family, variant)
    small = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
    ids, cache = jnp.zeros((2, 6), jnp.int32), model.init_cache(2, 8, jnp.bfloat16)

    def loss(params, ids):
        logits = model.clone(remat=True).apply({"params": params}, ids)
        return logits.astype(jnp.float32).sum()

    logits, after = jax.eval_shape(lambda p: model.apply({"params": p}, ids, cache=cache), small)
    assert (logits.dtype, after.keys.dtype) == (jnp.bfloat16, jnp.bfloat16)
    grads = jax.eval_shape(jax.grad(loss), small, ids)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(("family", "variant"), RICHEST)
def test_models_are_equal_and_hash_alike_when_their_configurations_are(family, variant):
    model, _ = loaded(family, variant)
    again = model.clone(config=dataclasses.replace(model.config))
    assert model == again and hash(model) == hash(again)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        *(
            (family, {"surprise": 3}, "surprise = 3, which is not known here")
            for family in FAMILIES
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window\n  got:      0"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("mistral", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("mistral", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar = 8"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"]}, "for each of 3 layers"),
        ("qwen2", {"use_sliding_window": False}, "sliding_window\n  got:      None"),
        ("qwen3", {"num_experts": 4}, "num_experts = 4"),
        ("gemma", {"hidden_act": "quick_gelu"}, "hidden_act\n  got:      'quick_gelu'"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping\n  got:      0"),
        ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar\n  got:      -1"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping = 5.0"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters\n  got:"),
        ("gemma3_text", {"model_type": "gemma3"}, "with Gemma3ForConditionalGeneration"),
        ("gemma3", {"text_config": None}, "got:      None"),
        ("gemma3", {"text_config": {"model_type": "gemma"}}, "text_config with model_type 'gemma'"),
        ("mistral3", {"text_config": {"model_type": "mistral", "x": 1}}, "x = 1, which is not"),
        ("mistral3", {"text_config": {"model_type": "ministral3"}}, "rope_parameters"),
        ("ministral3", {"rope_parameters": None}, "rope_parameters"),
        (
            "ministral3",
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "llama_4_scaling_beta": 0.1}},
            "original_max_position_embeddings",
        ),
        ("gpt2", {"activation_function": "mish"}, "activation_function\n  got:      'mish'"),
        ("gpt2", {"n_head": 3}, "n_head\n  got:      3\n  expected: a divisor of n_embd, 16"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("phi3", {"attention_bias": True}, "attention_bias = True"),
        ("phi3", {"partial_rotary_factor": 0.5}, "rotated part of head_dim\n  got:      3"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4}},
            "rope_scaling: long_factor\n  got:      None\n  expected: 4 positive numbers",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 3}},
            "rope_scaling: short_factor\n  got:      (1.0, 1.0, 1.0)",
        ),
        ("mixtral", {"num_experts_per_tok": 5}, "at most the 4 experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts\n  got:      0"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers\n  got:      (1,)"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step\n  got:      2"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "at most the 4 experts"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers\n  got:      (1, 0)"),
        ("smollm3", {"no_rope_layers": [1, 2, 1]}, "0 or 1 for each of 3 layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval\n  got:      0"),
        ("smollm3", {"use_sliding_window": False}, "sliding_window\n  got:      None"),
        ("olmo2", {"sliding_window": 4}, "sliding_window = 4"),
        ("granite", {"logits_scaling": 0}, "logits_scaling\n  got:      0"),
        ("granite", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar = 8"),
        ("seed_oss", {"attention_multiplier": 0.5}, "attention_multiplier = 0.5"),
        ("llama", {"attention_out_bias": True}, "attention_out_bias = True"),
    ],
)
def test_an_unimplemented_setting_raises_an_error_that_names_it(family, changes, message, tmp_path):
    variant = FAMILIES.get(family, ("tied", 7))[0]
    text = (FIXTURES / family / variant / "config.json").read_text()
    if "partial_rotary_factor" in changes:
        changes = {**changes, "head_dim": 6, "rope_parameters": None}
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(text), **changes}))
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def reread(family: str, variant: str, changes: dict, folder: Path):
    """The configuration of a fixture whose `config.json` says some things in other words."""
    shutil.copytree(FIXTURES / family / variant, folder, dirs_exist_ok=True)
    raw = {**json.loads((folder / "config.json").read_text()), **changes}
    raw = {key: value for key, value in raw.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(raw))
    return load(folder)[0].config


LONG = {"short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.0, 3.0, 5.0, 9.0]}


@pytest.mark.parametrize(
    ("family", "variant", "changes"),
    [
        ("gemma", "tied", {"hidden_act": "gelu", "tie_word_embeddings": "absent"}),
        ("gemma2", "capped", {"layer_types": "absent", "hidden_act": "gelu_pytorch_tanh"}),
        (
            "gemma3_text",
            "mixed",
            {
                "rope_parameters": "absent",
                "rope_theta": 1e6,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "cache_implementation": "hybrid",
            },
        ),
        (
            "gemma3_text",
            "untied",
            {"layer_types": "absent", "_sliding_window_pattern": "absent", "head_dim": 8},
        ),
        (
            "phi3",
            "long",
            {
                "rope_parameters": "absent",
                "rope_theta": 100.0,
                "rope_scaling": {"type": "su", **LONG},
                "attention_bias": False,
                "num_key_value_heads": 1,
            },
        ),
        ("qwen2", "mixed", {"layer_types": None}),
        ("qwen3_moe", "tied", {"num_local_experts": "absent", "num_experts": 4}),
        ("smollm3", "full", {"no_rope_layers": "absent", "layer_types": None}),
        ("smollm3", "window", {"layer_types": "absent", "max_window_layers": 28}),
    ],
)
def test_fields_in_the_words_of_older_files_mean_the_same(family, variant, changes, tmp_path):
    assert reread(family, variant, changes, tmp_path) == loaded(family, variant)[0].config
