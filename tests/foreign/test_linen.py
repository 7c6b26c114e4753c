"""Flax Linen's own attention, recurrence, convolutions and normalised weights."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.foreign.model_cases import assert_runs_adapted, data, drawn

TOKENS = data(2, 5, 8)  # (batch, time, features)
IMAGE = data(2, 6, 6, 3)  # (batch, height, width, channels)


def variables_of(module, *args):
    return drawn(jax.eval_shape(module.init, jax.random.key(0), *args))


def assert_module_runs_adapted(module, *args, **expected):
    assert_runs_adapted(module.apply, variables_of(module, *args), *args, **expected)


def test_attention_over_itself():
    module = nn.MultiHeadDotProductAttention(num_heads=2, out_features=8)
    mask = nn.make_causal_mask(jnp.ones((2, 5)))
    fn = lambda variables, x: module.apply(variables, x, mask=mask)  # noqa: E731
    assert_runs_adapted(fn, variables_of(module, TOKENS), TOKENS)


def test_attention_over_another_stream():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, out_features=6)
    assert_module_runs_adapted(module, TOKENS, data(2, 7, 8))


def test_attention_that_decodes_from_a_cache():
    module = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    tokens = TOKENS[:, :2]
    variables = variables_of(module, tokens)

    def decode(params, cache, x):
        outputs = []
        for step in range(x.shape[1]):
            token = x[:, step : step + 1]
            out, changed = module.apply(
                {"params": params, "cache": cache}, token, mutable=["cache"]
            )
            cache = changed["cache"]
            outputs.append(out)
        return jnp.concatenate(outputs, axis=1)

    assert_runs_adapted(decode, variables["params"], variables["cache"], tokens)


@pytest.mark.parametrize(
    "cell",
    [
        nn.LSTMCell,
        *(pytest.param(cell, marks=pytest.mark.slow) for cell in (nn.GRUCell, nn.MGUCell)),
    ],
    ids=lambda cell: cell.__name__,
)
def test_recurrence(cell):
    assert_module_runs_adapted(nn.RNN(cell(features=6)), TOKENS)


def test_recurrence_whose_kernels_are_joined_into_one_product():
    gates = [f"params/cell/{side}{gate}/kernel" for side in "hi" for gate in "ifgo"]
    assert_module_runs_adapted(
        nn.RNN(nn.OptimizedLSTMCell(features=6)),
        TOKENS,
        unseen=gates,
        formed=dict.fromkeys(gates, "concatenate"),
    )


def test_recurrence_both_ways():
    assert_module_runs_adapted(
        nn.Bidirectional(nn.RNN(nn.SimpleCell(4)), nn.RNN(nn.GRUCell(4))), TOKENS
    )


def test_recurrence_of_convolutions():
    module = nn.RNN(nn.ConvLSTMCell(features=4, kernel_size=(3,)))
    assert_module_runs_adapted(module, data(2, 3, 5, 3))  # (batch, time, width, channels)


class ConvolutionalNetwork(nn.Module):
    """Strides, dilation, groups and depth-wise kernels, norms and pooling, and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3), strides=(2, 2))(x)))
        x = x + nn.Conv(8, (3, 3), kernel_dilation=(2, 2))(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8, padding="CIRCULAR")(x)
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (1, 1), feature_group_count=2)(x))
        x = nn.avg_pool(nn.silu(x), (2, 2), strides=(2, 2))
        return nn.Dense(3)(x.reshape(len(x), -1))


@pytest.mark.usefixtures("usual_promotion")
def test_convolutional_network():
    assert_module_runs_adapted(ConvolutionalNetwork(), IMAGE)


def test_convolution_with_a_kernel_for_every_place():
    assert_module_runs_adapted(nn.ConvLocal(4, (3, 3), padding="VALID"), IMAGE)


@pytest.mark.parametrize("transposed", [False, True])
def test_transposed_convolution(transposed):
    module = nn.ConvTranspose(5, (4, 4), strides=(2, 2), transpose_kernel=transposed)
    assert_module_runs_adapted(module, IMAGE)


def test_einsum_layer():
    assert_module_runs_adapted(nn.Einsum((2, 8, 4), "...d,hdk->...hk"), TOKENS)


def test_embedding_with_its_own_head():
    module = nn.Embed(11, 6)
    ids = jnp.array([[1, 4, 10]])
    fn = lambda variables, ids: module.apply(  # noqa: E731
        variables, module.apply(variables, ids), method="attend"
    )
    assert_runs_adapted(fn, variables_of(module, ids), ids)


class Normalized(nn.Module):
    wrapper: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.wrapper(nn.Dense(4, name="dense"))(x)


def test_a_weight_divided_by_its_own_norm_is_formed():
    formed = {"params/dense/kernel": "mul"}
    assert_module_runs_adapted(Normalized(nn.WeightNorm), TOKENS, formed=formed)
