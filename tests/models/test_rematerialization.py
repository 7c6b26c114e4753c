"""What layers keep for the backward pass: equal gradients, no matmul and no kernel twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.models import (
    GPT2,
    Bert,
    BertConfig,
    Gemma2,
    Gemma2Config,
    GPT2Config,
    Llama,
    LlamaConfig,
    Mixtral,
    MixtralConfig,
    Qwen3,
    Qwen3Config,
)
from jax_lora.plan.matmul_flops import matmul_flops
from tests.foreign.model_cases import drawn, random_adapter
from tests.lora_cases import equations

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
BERT = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
MODELS = {
    "llama": lambda: Llama(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3(Qwen3Config(**SIZES)),
    "gemma2": lambda: Gemma2(Gemma2Config(**SIZES, sliding_window=4)),
    "mixtral": lambda: Mixtral(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "gpt2": lambda: GPT2(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=3, n_head=2)),
    "bert": lambda: Bert(BertConfig(**BERT)),
}
IDS = np.random.default_rng(0).integers(0, 32, (2, 12)).astype(np.int32)


@functools.cache
def case(name):
    """A model, its variables, and an adapter whose factors are both random."""
    model = MODELS[name]()
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), IDS))
    kernels = jl.find_kernels(model.apply, variables, IDS)
    return model, variables, random_adapter(variables, kernels)


def gradient_of(name, **attributes):
    model, variables, adapter = case(name)
    apply = jl.lora_apply(model.clone(**attributes).apply)

    def loss(adapter):
        return jnp.sum(jnp.sin(apply(jl.combine(variables, adapter), IDS)))

    return jax.grad(loss), adapter


def traced(name, **attributes):
    gradient, adapter = gradient_of(name, **attributes)
    return jax.make_jaxpr(gradient)(adapter).jaxpr


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("llama", "names"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [("llama", "full"), ("gemma2", "names"), ("mixtral", "names")]
        ),
    ],
)
def test_the_gradients_are_the_same(name, remat):
    expected, adapter = gradient_of(name, remat="none")
    got, _ = gradient_of(name, remat=remat)
    both = jax.jit(lambda adapter: (got(adapter), expected(adapter)))(adapter)
    pairs = zip(*map(jax.tree.leaves, both), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_names_repeats_no_matmul_beside_a_fused_kernel(name):
    flash = {"attention": "flash"}
    kept, names, full = (
        matmul_flops(traced(name, remat=remat, **flash)) for remat in ("none", "names", "full")
    )
    # Inside the blocks of attention there are matmuls too: they run as often with "names".
    assert names == kept
    assert full > kept


def test_names_runs_the_attention_kernel_once_per_layer():
    count = lambda remat: sum(  # noqa: E731
        eqn.primitive.name == "exp"
        for eqn in equations(traced("llama", remat=remat, attention="flash"))
    )
    # Forward, two exponentials in a block; backward, one more.
    assert count("names") == count("none")
    assert count("full") > count("none")


@pytest.mark.parametrize("name", ["mixtral", "bert"])
def test_names_repeats_only_the_scores_of_dense_attention(name):
    kept, names, full = (
        matmul_flops(traced(name, remat=remat)) for remat in ("none", "names", "full")
    )
    assert kept <= names < full


def residual_bytes(name, remat, tokens):
    model, variables, adapter = case(name)
    ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
    apply = jl.lora_apply(model.clone(remat=remat, attention="flash").apply)

    def residuals(adapter, ids):
        return jax.vjp(lambda adapter: apply(jl.combine(variables, adapter), ids), adapter)[1]

    shapes = jax.tree.leaves(jax.eval_shape(residuals, adapter, ids))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)


def test_names_keeps_less_than_everything_and_more_than_the_inputs():
    by_token = {
        remat: residual_bytes("llama", remat, 48) - residual_bytes("llama", remat, 24)
        for remat in ("none", "names", "full")
    }
    assert by_token["full"] < by_token["names"] < 0.75 * by_token["none"]


def test_booleans_mean_full_and_none():
    assert str(traced("llama", remat=True)) == str(traced("llama", remat="full"))
    assert str(traced("llama", remat=False)) == str(traced("llama", remat="none"))
