"""Llama: PyTorch's logits, padding, cache, remat, dtypes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_lora.errors import ConfigError
from jax_lora.models import Llama, LlamaConfig, load

FIXTURES = Path(__file__).parent.parent / "fixtures" / "llama"
VARIANTS = sorted(folder.name for folder in FIXTURES.iterdir())
TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def tiny():
    model = Llama(TINY)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def run(model, params, *args, **kwargs):
    """`model.apply`, compiled: a tenth of the time of one small operation after another."""
    static = [name for name in ("return_hidden", "method") if name in kwargs]
    return jax.jit(model.apply, static_argnames=static)({"params": params}, *args, **kwargs)


def test_every_rope_type_has_a_fixture():
    assert VARIANTS == ["biased", "dynamic", "linear", "llama3", "tied", "untied", "yarn"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_pytorch_on_full_left_and_right_padded_rows(variant):
    model, params = load(FIXTURES / variant)
    expected = load_file(FIXTURES / variant / "expected.safetensors")
    ids, mask = (
        jnp.asarray(expected[key].astype(np.int32)) for key in ("input_ids", "attention_mask")
    )
    logits = jax.jit(model.apply)({"params": params}, ids, attention_mask=mask)
    real = np.asarray(mask, bool)  # what stands at padding means nothing
    np.testing.assert_allclose(logits[real], expected["logits"][real], atol=1e-4)


def test_without_a_mask_equals_a_mask_of_ones(tiny):
    model, params = tiny
    ids = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    plain = run(model, params, ids)
    masked = run(model, params, ids, attention_mask=jnp.ones_like(ids))
    np.testing.assert_allclose(plain, masked, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(tiny, side):
    model, params = tiny
    ids = jnp.array([[5, 6, 7]], jnp.int32)
    widths = ((0, 0), (2, 0) if side == "left" else (0, 2))
    padded, mask = jnp.pad(ids, widths), jnp.pad(jnp.ones_like(ids), widths)
    alone = run(model, params, ids)
    beside = run(model, params, padded, attention_mask=mask)
    beside = beside[:, 2:] if side == "left" else beside[:, :3]
    np.testing.assert_allclose(alone, beside, atol=1e-5)


def test_packed_documents_do_not_see_each_other(tiny):
    model, params = tiny
    ids = jnp.array([[5, 6, 7, 8, 9, 10, 11]], jnp.int32)
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1]], jnp.int32)
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3]], jnp.int32)
    together = run(model, params, ids, positions=positions, segment_ids=segments)
    second = run(model, params, ids[:, 3:])
    np.testing.assert_allclose(together[:, 3:], second, atol=1e-5)


def test_greedy_with_cache_equals_without_for_unequal_prompts(tiny):
    model, params = tiny
    prompts, steps = [[3, 4, 5, 6], [7, 8]], 6
    ids = jnp.array([[3, 4, 5, 6], [0, 0, 7, 8]], jnp.int32)
    mask = jnp.array([[1, 1, 1, 1] + [1] * steps, [0, 0, 1, 1] + [1] * steps], jnp.int32)
    cache = model.init_cache(2, 4 + steps)
    apply = jax.jit(model.apply)
    logits, cache = apply({"params": params}, ids, attention_mask=mask, cache=cache)
    answers = [logits[:, -1].argmax(-1)]
    for _ in range(steps - 1):
        logits, cache = apply(
            {"params": params}, answers[-1][:, None], attention_mask=mask, cache=cache
        )
        answers.append(logits[:, -1].argmax(-1))
    assert int(cache.filled) == 4 + steps - 1
    plain = jax.jit(lambda ids: model.apply({"params": params}, ids).argmax(-1))
    for row, prompt in enumerate(prompts):
        known = list(prompt)
        for _ in range(steps):  # what stands to the right changes nothing, so one shape will do
            rest = [0] * (4 + steps - len(known))
            known.append(int(plain(jnp.array([known + rest], jnp.int32))[0, len(known) - 1]))
        assert known[len(prompt) :] == [int(answer[row]) for answer in answers]


def test_cache_without_a_mask_counts_every_token(tiny):
    model, params = tiny
    ids = jnp.array([[3, 4, 5, 6, 7]], jnp.int32)
    whole = run(model, params, ids)
    cache = model.init_cache(1, 8)
    first, cache = run(model, params, ids[:, :3], cache=cache)
    second, cache = run(model, params, ids[:, 3:], cache=cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-5)


def test_remat_shows_in_the_jaxpr(tiny):
    model, params = tiny
    ids = jnp.array([[3, 4]], jnp.int32)
    text = str(jax.make_jaxpr(model.clone(remat=True).apply)({"params": params}, ids))
    assert "remat" in text or "checkpoint" in text


def test_hidden_states_then_unembed_are_the_logits(tiny):
    model, params = tiny
    ids = jnp.array([[3, 4, 5]], jnp.int32)
    hidden = run(model, params, ids, return_hidden=True)
    assert hidden.shape == (1, 3, 16)
    logits = run(model, params, hidden, method="unembed")
    np.testing.assert_array_equal(logits, run(model, params, ids))


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bfloat16_parameters_give_bfloat16_logits_near_float32(tied):
    config = LlamaConfig(**{**TINY.__dict__, "tie_word_embeddings": tied, "initializer_range": 0.1})
    ids = jnp.array([[3, 4, 5, 6]], jnp.int32)
    model = Llama(config)
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    small = jax.tree.map(lambda p: np.asarray(p).astype(jnp.bfloat16), params)
    logits = run(model, small, ids)
    assert logits.dtype == jnp.bfloat16
    wide = run(model, jax.tree.map(np.float32, small), ids)
    np.testing.assert_allclose(np.float32(logits), wide, atol=0.05)


def test_cache_of_another_dtype_keeps_the_logits_dtype(tiny):
    model, params = tiny
    ids = jnp.array([[3, 4, 5, 6]], jnp.int32)
    cache = model.init_cache(1, 6, jnp.bfloat16)
    logits, cache = run(model, params, ids, cache=cache)
    assert (logits.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(logits, run(model, params, ids), atol=0.1)


@pytest.mark.parametrize(
    ("shape", "others", "message"),
    [
        ((4,), {}, "input_ids\n  got:      int32 (4,)\n  expected: integers (batch, tokens)"),
        ((2, 4), {"attention_mask": (2, 3)}, "attention_mask\n  got:      int32 (2, 3)"),
        ((2, 4), {"positions": (1, 4)}, "positions\n  got:      int32 (1, 4)"),
        ((2, 4), {"segment_ids": (4, 4)}, "segment_ids\n  got:      int32 (4, 4)"),
        ((2, 4), {"cache": (1, 8)}, "expected: room for 2 sequences of 4 tokens"),
        ((2, 4), {"cache": (2, 3)}, "expected: room for 2 sequences of 4 tokens"),
        ((2, 4), {"cache": (2, 8), "attention_mask": (2, 4)}, "expected: shape (2, 8)"),
        ((2, 4), {"cache": (2, 8), "segment_ids": (2, 4)}, "None together with a cache"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_argument(shape, others, message):
    model = Llama(TINY)
    arguments = {
        name: model.init_cache(*value) if name == "cache" else jnp.zeros(value, jnp.int32)
        for name, value in others.items()
    }
    with pytest.raises(ConfigError) as caught:
        model.init(jax.random.key(0), jnp.zeros(shape, jnp.int32), **arguments)
    assert message in str(caught.value)


def test_parameters_are_stacked_under_familiar_names(tiny):
    _, params = tiny
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert flat == {
        "embed_tokens/embedding": (32, 16),
        "layers/attn/q_proj/kernel": (2, 16, 16),
        "layers/attn/k_proj/kernel": (2, 16, 8),
        "layers/attn/v_proj/kernel": (2, 16, 8),
        "layers/attn/o_proj/kernel": (2, 16, 16),
        "layers/input_norm/scale": (2, 16),
        "layers/mlp/gate_proj/kernel": (2, 16, 24),
        "layers/mlp/up_proj/kernel": (2, 16, 24),
        "layers/mlp/down_proj/kernel": (2, 24, 16),
        "layers/post_attention_norm/scale": (2, 16),
        "lm_head/kernel": (16, 32),
        "norm/scale": (16,),
    }


def test_hf_names_cover_every_kernel(tiny):
    model, params = tiny
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.ndim > 1
    }
    assert {path for path in model.hf_names if not path.endswith("scale")} == {
        path for path in paths if not path.endswith("scale")
    }
    assert model.hf_names["layers/mlp/down_proj/kernel"] == "model.layers.{layer}.mlp.down_proj"


def test_model_is_hashable_with_rope_scaling():
    config = LlamaConfig(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert hash(Llama(config)) == hash(Llama(config))
