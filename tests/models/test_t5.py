"""T5: PyTorch's logits and answers, files of all versions, cache, adapters, errors."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_lora as jl
from jax_lora.errors import ConfigError, ModelError
from jax_lora.models import T5Config, load, replicate_layers, save, untie
from jax_lora.models.relative_positions import bucket_table
from tests.lora_cases import assert_close, merged_tree

FIXTURES = Path(__file__).parent.parent / "fixtures" / "t5"
VARIANTS = ["relu", "gated", "gated_tied", "unscaled"]
EACH = pytest.mark.parametrize("variant", VARIANTS)


@functools.cache
def loaded(variant: str):
    return load(FIXTURES / variant)


def batch(variant: str):
    """The inputs, PyTorch's logits, and where answers are no padding."""
    stored = load_file(FIXTURES / variant / "expected.safetensors")
    inputs = {k: jnp.asarray(v.astype(np.int32)) for k, v in stored.items() if k != "logits"}
    greedy = np.asarray(inputs.pop("greedy"))
    return inputs, stored["logits"], np.asarray(inputs["decoder_attention_mask"], bool), greedy


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 9), (32, 64), (20, 77), (64, 512)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_of_distances_are_pytorchs(buckets, most, both_ways):
    stored = load_file(FIXTURES / "buckets.safetensors")[f"{buckets} {most} {both_ways}"]
    table = bucket_table(buckets, most, both_ways=both_ways)
    distances = np.clip(np.arange(-600, 601), -most, most)
    np.testing.assert_array_equal(table[distances + most], stored)


@EACH
def test_logits_equal_pytorch_on_full_left_and_right_padded_rows(variant):
    model, params = loaded(variant)
    inputs, expected, real, _ = batch(variant)
    logits = jax.jit(model.apply)({"params": params}, **inputs)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)
    assert np.isfinite(logits).all()


@EACH
def test_saving_a_loaded_model_reproduces_its_files(variant, tmp_path):
    folder = FIXTURES / variant
    save(tmp_path, *loaded(variant))
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


@EACH
def test_a_configuration_written_anew_reads_as_the_old_one(variant, tmp_path):
    model, params = loaded(variant)
    save(tmp_path, model.clone(config=dataclasses.replace(model.config, source="")), params)
    assert load(tmp_path)[0] == model
    transformers = pytest.importorskip("transformers")
    ours = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    theirs = transformers.AutoConfig.from_pretrained(FIXTURES / variant).to_dict()
    for key in set(theirs) - {"transformers_version", "_name_or_path"}:
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize("variant", ["relu", "gated"])
def test_answers_through_a_cache_are_pytorchs(variant):
    model, params = loaded(variant)
    inputs, _, _, greedy = batch(variant)
    text, mask = inputs["input_ids"], inputs["attention_mask"]

    @jax.jit
    def answer(params):
        variables = {"params": params}
        encoded = model.apply(variables, text, mask, method="encode")
        cache, token = model.init_cache(3, 10), model.first_tokens(3)
        decode = functools.partial(model.apply, variables, method="decode")

        def step(carry, _):
            token, cache = carry
            logits, cache = decode(token, None, mask, cache=cache)
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # (3, 1)
            return (token, cache), token[:, 0]

        logits, cache = decode(token, encoded, mask, cache=cache)
        first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        _, rest = jax.lax.scan(step, (first, cache), length=9)
        return jnp.concatenate([token, first, rest.T], axis=1)

    np.testing.assert_array_equal(answer(params), greedy)


def test_tokens_three_at_a_time_through_a_cache_get_pytorchs_logits():
    model, params = loaded("gated")
    inputs, expected, real, _ = batch("gated")
    mask, answers = inputs["attention_mask"], inputs["decoder_input_ids"]

    @jax.jit
    def run(params):
        variables, cache, parts = {"params": params}, model.init_cache(3, 9), []
        encoded = model.apply(variables, inputs["input_ids"], mask, method="encode")
        for i in range(0, 9, 3):
            few = answers[:, i : i + 3]
            given = (few, encoded, mask, inputs["decoder_attention_mask"])
            logits, cache = model.apply(variables, *given, cache=cache, method="decode")
            parts.append(logits)
        return jnp.concatenate(parts, axis=1)

    np.testing.assert_allclose(run(params)[real], expected[real], atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "count"), [pytest.param("relu", 16, marks=pytest.mark.slow), ("gated", 18)]
)
def test_every_kernel_is_found_named_and_adapted_and_merging_changes_nothing(variant, count):
    model, params = loaded(variant)
    variables, (inputs, _, _, _) = {"params": params}, batch(variant)
    text, answers = inputs["input_ids"][:1, :3], inputs["decoder_input_ids"][:1, :3]
    kernels = jl.find_kernels(model.apply, variables, text, decoder_input_ids=answers)
    named = [path for path in model.hf_names if not path.endswith("/scale")]
    assert set(kernels) == {f"params/{path}" for path in named}
    config = jl.LoraConfig(rank=2, alpha=4.0, targets="all-linear")

    @jax.jit
    def run(variables):
        adapter = jl.lora_init(jax.random.key(0), variables, config, kernels=kernels)
        assert len(adapter.pairs) == count
        assert "params/lm_head/kernel" not in adapter.pairs
        adapter = jax.tree.map(lambda x: x + 0.1, adapter)  # no B of zeros
        apply = functools.partial(
            jl.lora_apply(model.apply, on_materialize="error"), decoder_input_ids=answers
        )
        factored = apply(jl.combine(variables, adapter), text)
        merged = merged_tree(variables, adapter)
        plain = [model.apply(v, text, decoder_input_ids=answers) for v in (merged, variables)]
        return (jl.merge(variables, adapter), merged), factored, *plain

    trees, factored, merged, base = run(variables)
    assert_close(*trees, 1e-5)
    np.testing.assert_allclose(factored, merged, atol=1e-4)
    assert np.abs(merged - base).max() > 0.1


def test_arithmetic_stays_in_bfloat16_with_remat_and_cache_too():
    model, params = loaded("gated")
    small = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
    ids, cache = jnp.zeros((2, 6), jnp.int32), model.init_cache(2, 8, jnp.bfloat16)

    def loss(params):
        logits = model.clone(remat=True).apply({"params": params}, ids, decoder_input_ids=ids)
        return logits.astype(jnp.float32).sum()

    def decode(params):
        encoded = model.apply({"params": params}, ids, method="encode")
        return model.apply({"params": params}, ids, encoded, cache=cache, method="decode")

    logits, after = jax.eval_shape(decode, small)
    assert (logits.dtype, after.keys.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert after.text_keys.shape == (3, 2, 6, 2, 6)
    grads = jax.eval_shape(jax.grad(loss), small)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_an_untied_model_computes_the_same():
    model, params = loaded("relu")
    inputs = batch("relu")[0]
    untied, more = untie(model, params)
    assert untied.config.scale_decoder_outputs and not untied.config.tie_word_embeddings
    both = [jax.jit(m.apply)({"params": p}, **inputs) for m, p in ((model, params), (untied, more))]
    np.testing.assert_allclose(*both, atol=1e-5)


def test_two_stacks_are_not_replicated():
    with pytest.raises(ModelError, match="a T5, whose layers are two stacks"):
        replicate_layers(*loaded("relu"), [[0, 1]])


# -----------------------------------------------------------------------------------------------
# Files of other ages
# -----------------------------------------------------------------------------------------------


def changed(folder: Path, variant: str, fields: dict, tensors: dict) -> Path:
    """A copy of a single-file fixture with other fields, None for absent, and more tensors."""
    shutil.copytree(FIXTURES / variant, folder, dirs_exist_ok=True)
    raw = {**json.loads((folder / "config.json").read_text()), **fields}
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, **tensors}, folder / "model.safetensors")
    return folder


OLD = {"scale_decoder_outputs": None, "dense_act_fn": None, "is_gated_act": None}


def test_a_head_apart_is_known_by_older_and_by_newer_fields(tmp_path):
    newer = loaded("gated")[0].config
    assert (newer.tie_word_embeddings, newer.scale_decoder_outputs) == (False, False)
    older = changed(tmp_path, "gated", {**OLD, "tie_word_embeddings": False}, {})
    assert load(older)[0].config == newer


def test_copies_of_the_embedding_are_no_head(tmp_path):
    table = load_file(FIXTURES / "gated_tied" / "model.safetensors")["shared.weight"]
    names = ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")
    copies = {f"{name}.weight": table for name in names}
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    folder = changed(tmp_path, "gated_tied", OLD, {**copies, unused: table})
    model, params = load(folder)
    assert model == loaded("gated_tied")[0]
    assert "lm_head" not in params


def test_without_a_head_the_embedding_is_it_and_is_not_scaled():
    config = loaded("unscaled")[0].config
    assert (config.tie_word_embeddings, config.scale_decoder_outputs) == (True, False)


# -----------------------------------------------------------------------------------------------
# Refusals
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"surprise": 3}, "surprise = 3, which is not known here"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder = False"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder = True"),
        ({"feed_forward_proj": "gated-mish", **OLD}, "dense_act_fn\n  got:      'mish'"),
        ({"feed_forward_proj": "double-gated-gelu"}, "feed_forward_proj\n  got:"),
        ({"is_gated_act": False}, "is_gated_act\n  got:      False"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets\n  got:      2"),
        ({"relative_attention_max_distance": 4}, "relative_attention_max_distance\n  got:      4"),
        ({"num_decoder_layers": -1}, "num_decoder_layers = -1: expected an integer from 1"),
        ({"architectures": ["T5EncoderModel"]}, "architectures ['T5EncoderModel']"),
    ],
)
def test_an_unimplemented_setting_raises_an_error_that_names_it(fields, message, tmp_path):
    with pytest.raises(ModelError) as caught:
        load(changed(tmp_path, "gated_tied", fields, {}))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_inputs_that_do_not_fit_are_refused():
    model, params = loaded("relu")

    def message(ids, encoded, *masks):
        with pytest.raises(ConfigError) as caught:
            decode = functools.partial(model.apply, method="decode")
            jax.eval_shape(decode, {"params": params}, ids, encoded, *masks)
        return str(caught.value)

    ids, encoded = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 5, 16))
    assert "the output of encode" in message(ids, None)
    assert "2 inputs\n  expected: 1, one for each target" in message(ids[:1], encoded)
    assert "shape (2, 3)\n  expected: shape (2, 5)" in message(ids, encoded, ids)
    assert "attention_mask" in message(ids, encoded, None, jnp.zeros((2, 4), jnp.int32))


def test_answers_start_with_the_padding_token_unless_told():
    assert T5Config().decoder_start_token_id == 0
    assert T5Config(decoder_start_token_id=7, pad_token_id=3).decoder_start_token_id == 7
