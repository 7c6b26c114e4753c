"""Tests of both encoder families: PyTorch's logits, files, adapters, errors."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_lora as jl
from jax_lora.errors import ConfigError, ModelError
from jax_lora.models import load, save
from tests.lora_cases import assert_close, merged_tree

FIXTURES = Path(__file__).parent.parent / "fixtures"
EVERY = [(family, kind) for family in ("bert", "roberta") for kind in ("classifier", "masked_lm")]
OTHERS = [("headless", "bert"), ("headless", "roberta"), ("pretraining", "bert")]
EACH = pytest.mark.parametrize(("family", "kind"), EVERY)


@functools.cache
def loaded(family: str, kind: str):
    model, params = load(FIXTURES / family / kind)
    return model, params, jax.jit(model.apply)


def batch(family: str, kind: str):
    stored = load_file(FIXTURES / family / kind / "expected.safetensors")
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [jnp.asarray(stored[name].astype(np.int32)) for name in names]
    return *inputs, stored["logits"], stored["logits_of_types"]


@pytest.mark.parametrize(("family", "kind"), EVERY + OTHERS)
def test_outputs_equal_pytorch_on_full_left_and_right_padded_rows(family, kind):
    _, params, apply = loaded(family, kind)
    ids, mask, types, expected, of_types = batch(family, kind)
    of_zeros = apply({"params": params}, ids, mask, jnp.zeros_like(types))
    np.testing.assert_allclose(of_zeros, expected, atol=1e-4)
    np.testing.assert_allclose(apply({"params": params}, ids, mask, types), of_types, atol=1e-4)


@pytest.mark.parametrize(("family", "kind"), [("bert", "masked_lm"), ("roberta", "classifier")])
def test_without_a_mask_every_token_is_real_and_without_types_of_the_first_text(family, kind):
    _, params, apply = loaded(family, kind)
    ids = batch(family, kind)[0].at[1:].set(2)  # (3, 12), as compiled for the other tests
    given = apply({"params": params}, ids, jnp.ones_like(ids), jnp.zeros_like(ids))
    np.testing.assert_allclose(apply({"params": params}, ids), given, atol=1e-6)


@EACH
def test_saving_a_loaded_model_reproduces_its_files(family, kind, tmp_path):
    folder = FIXTURES / family / kind
    save(tmp_path, *loaded(family, kind)[:2])
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
def test_a_configuration_written_anew_reads_as_the_old_one(family, kind, tmp_path):
    model, params, _ = loaded(family, kind)
    save(tmp_path, model.clone(config=dataclasses.replace(model.config, source="")), params)
    assert load(tmp_path)[0] == model
    transformers = pytest.importorskip("transformers")
    ours = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    theirs = transformers.AutoConfig.from_pretrained(FIXTURES / family / kind).to_dict()
    for key in set(theirs) - {"transformers_version", "_name_or_path"}:
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize(("family", "kind"), OTHERS)
def test_a_saved_model_says_which_head_it_has(family, kind, tmp_path):
    model, params, _ = loaded(family, kind)
    save(tmp_path, model, params)
    again, same = load(tmp_path)
    assert again == model
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, same))
    named = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert named == {"headless": [f"{type(model).__name__}Model"]}.get(family, ["BertForMaskedLM"])


# Six kernels in each layer; BERT's pooler, RoBERTa's first layer of the head, the transforms.
@EACH
def test_every_kernel_is_found_and_named_and_all_but_the_head_is_linear(family, kind):
    model, params, _ = loaded(family, kind)
    variables, ids = {"params": params}, jnp.zeros((1, 3), jnp.int32)
    kernels = jl.find_kernels(model.apply, variables, ids)
    named = [path for path in model.hf_names if not path.endswith("/scale")]
    assert set(kernels) == {f"params/{path}" for path in named}
    config = jl.LoraConfig(rank=2, targets="all-linear")
    make = functools.partial(jl.lora_init, config=config, kernels=kernels)
    adapter = jax.eval_shape(make, jax.random.key(0), variables)
    assert len(adapter.pairs) == 7
    heads = {"params/classifier/kernel", "params/classifier/out_proj/kernel"}
    assert not heads & set(adapter.pairs)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", "masked_lm"), pytest.param("roberta", "classifier", marks=pytest.mark.slow)],
)
def test_merging_adapters_of_kernels_and_embeddings_changes_nothing(family, kind):
    model, params, _ = loaded(family, kind)
    variables, ids = {"params": params}, batch(family, kind)[0][:1, :3]
    kernels = jl.find_kernels(model.apply, variables, ids)
    config = jl.LoraConfig(rank=2, alpha=4.0, targets="*")

    @jax.jit
    def run(variables):
        adapter = jl.lora_init(jax.random.key(0), variables, config, kernels=kernels)
        assert len(adapter.pairs) == len(kernels) >= 10
        adapter = jax.tree.map(lambda x: x + 0.1, adapter)  # no B of zeros
        apply = jl.lora_apply(model.apply, on_materialize="error")
        factored = apply(jl.combine(variables, adapter), ids)
        merged = merged_tree(variables, adapter)
        plain = [model.apply(each, ids) for each in (merged, variables)]
        return (jl.merge(variables, adapter), merged), factored, *plain

    trees, factored, merged, base = run(variables)
    assert_close(*trees, 1e-5)
    np.testing.assert_allclose(factored, merged, atol=1e-4)
    assert np.abs(merged - base).max() > 0.1


@EACH
def test_arithmetic_stays_in_bfloat16_with_remat_too(family, kind):
    model, params, _ = loaded(family, kind)
    small = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
    ids = jnp.zeros((2, 6), jnp.int32)

    def loss(params):
        logits = model.clone(remat=True).apply({"params": params}, ids, jnp.ones_like(ids))
        assert logits.dtype == jnp.bfloat16
        return logits.astype(jnp.float32).sum()

    grads = jax.eval_shape(jax.grad(loss), small)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


@EACH
def test_hidden_states_come_without_the_head(family, kind):
    model, params, _ = loaded(family, kind)
    ids = jnp.zeros((2, 6), jnp.int32)
    apply = functools.partial(model.apply, return_hidden=True)
    assert jax.eval_shape(apply, {"params": params}, ids).shape == (2, 6, 16)


def refused(folder: Path, family: str, kind: str, changes: dict) -> str:
    text = (FIXTURES / family / kind / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps({**json.loads(text), **changes}))
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 3}, "surprise = 3, which is not known here"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"chunk_size_feed_forward": 4}, "chunk_size_feed_forward = 4"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"hidden_act": "mish"}, "hidden_act\n  got:      'mish'"),
        ({"num_attention_heads": 3}, "num_attention_heads\n  got:      3"),
        ({"type_vocab_size": 0}, "type_vocab_size\n  got:      0"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps\n  got:      -1.0"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings\n  got:      False"),
        ({"architectures": ["ForTokenClassification"]}, "['ForTokenClassification']"),
        ({"id2label": {"0": "a", "2": "b"}}, "labels\n  got:      {'0': 'a', '2': 'b'}"),
    ],
)
def test_an_unimplemented_setting_raises_an_error_that_names_it(family, changes, message, tmp_path):
    assert message in refused(tmp_path, family, "masked_lm", changes)


@pytest.mark.parametrize(("family", "room"), [("bert", 16), ("roberta", 14)])
def test_rows_that_do_not_fit_are_refused(family, room):
    model, params, _ = loaded(family, "classifier")

    def message(*inputs):
        with pytest.raises(ConfigError) as caught:
            jax.eval_shape(model.apply, {"params": params}, *inputs)
        return str(caught.value)

    ids = jnp.zeros((1, room + 1), jnp.int32)
    assert f"sequences of {room + 1} tokens\n  expected: at most {room}" in message(ids)
    fitting = ids[:, 1:]
    assert jax.eval_shape(model.apply, {"params": params}, fitting).shape == (1, 3)
    assert "token_type_ids" in message(fitting, None, ids)
    assert "attention_mask" in message(fitting, ids)
    assert "input_ids" in message(fitting[0])


def test_labels_have_the_names_that_the_file_gives_them(tmp_path):
    folder = FIXTURES / "bert" / "classifier"
    for file in folder.glob("model*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    for changes in ({"id2label": {"2": "c", "0": "a", "1": "b"}}, {"num_labels": 3}):
        named = {k: v for k, v in raw.items() if k not in ("id2label", "label2id")}
        (tmp_path / "config.json").write_text(json.dumps({**named, **changes}))
        config = load(tmp_path)[0].config
        names = ("a", "b", "c") if "id2label" in changes else ("LABEL_0", "LABEL_1", "LABEL_2")
        assert config.labels == names
