"""Flax NNX's own modules: split, adapted, and merged again inside the function."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import nnx

from tests.foreign.model_cases import assert_runs_adapted, data, drawn

TOKENS = data(2, 5, 8)  # (batch, time, features)
IMAGE = data(2, 6, 6, 3)  # (batch, height, width, channels)


def split(make):
    """The graph, the parameters and the rest of a model, without an eager initialisation."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return graph, drawn(params), drawn(rest)


def assert_module_runs_adapted(make, *args, call=lambda model, *args: model(*args), **expected):
    graph, params, rest = split(make)

    def fn(params, rest, *args):
        model = nnx.merge(graph, params, rest, copy=True)
        return call(model, *args), nnx.state(model, nnx.BatchStat)

    assert_runs_adapted(fn, params, rest, *args, **expected)


def test_attention_with_normalised_queries():
    make = lambda rngs: nnx.MultiHeadAttention(  # noqa: E731
        2, 8, qkv_features=12, out_features=6, normalize_qk=True, decode=False, rngs=rngs
    )
    assert_module_runs_adapted(make, TOKENS)


def test_attention_over_another_stream():
    make = lambda rngs: nnx.MultiHeadAttention(2, 8, in_kv_features=4, decode=False, rngs=rngs)  # noqa: E731
    assert_module_runs_adapted(make, TOKENS, data(2, 7, 4))


def test_attention_that_decodes_from_a_cache():
    make = lambda rngs: nnx.MultiHeadAttention(2, 8, decode=True, rngs=rngs)  # noqa: E731

    def decode(model, x):
        model.init_cache(x.shape)
        return jnp.concatenate([model(x[:, t : t + 1]) for t in range(x.shape[1])], axis=1)

    assert_module_runs_adapted(make, TOKENS[:, :2], call=decode)


@pytest.mark.parametrize(
    "cell",
    [
        nnx.LSTMCell,
        *(pytest.param(cell, marks=pytest.mark.slow) for cell in (nnx.GRUCell, nnx.SimpleCell)),
    ],
    ids=lambda cell: cell.__name__,
)
def test_recurrence(cell):
    assert_module_runs_adapted(lambda rngs: nnx.RNN(cell(8, 6, rngs=rngs), rngs=rngs), TOKENS)


def test_recurrence_with_one_product_for_all_gates():
    make = lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(8, 6, rngs=rngs), rngs=rngs)  # noqa: E731
    assert_module_runs_adapted(make, TOKENS)


class ConvolutionalNetwork(nnx.Module):
    """A convolutional network that keeps running statistics."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (2, 2), strides=2, rngs=rngs)
        self.head = nnx.LinearGeneral((6, 6, 4), (2, 3), axis=(1, 2, 3), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.head(self.up(nnx.silu(self.depthwise(x))))


@pytest.mark.usefixtures("usual_promotion")
def test_convolutional_network_in_training():
    assert_module_runs_adapted(ConvolutionalNetwork, IMAGE)


class Layer(nnx.Module):
    """A residual layer."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Stack(nnx.Module):
    """Layers made by vmap and run by scan, under remat, between a table and its own head."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.vmap(Layer, in_axes=0, out_axes=0)(rngs.split(3))

    def __call__(self, ids):
        run = nnx.scan(
            nnx.remat(lambda x, layer: layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return self.embed.attend(run(self.embed(ids), self.layers))


@pytest.mark.usefixtures("usual_promotion")
def test_scanned_layers():
    """`nnx.scan` hands every layer's parameters back, used or not."""
    assert_module_runs_adapted(Stack, jnp.array([[1, 4, 10]]))
