"""Equinox's own modules, split into arrays and the rest by `eqx.partition`."""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from tests.foreign.model_cases import assert_runs_adapted, data, drawn

TOKENS = data(5, 8)  # (time, features)
IMAGE = data(3, 6, 6)  # (channels, height, width)
KEY = jax.random.key(0)


def assert_module_runs_adapted(make, *args, call=lambda model, *args: model(*args), **expected):
    model = eqx.filter_eval_shape(make)
    arrays, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    fn = lambda arrays, *args: call(eqx.combine(arrays, static), *args)  # noqa: E731
    assert_runs_adapted(fn, drawn(arrays), *args, **expected)


def over_time(model, x):
    return jax.vmap(model)(x)


def test_perceptron_over_a_batch():
    make = lambda: eqx.nn.MLP(8, 3, 12, depth=2, key=KEY)  # noqa: E731
    assert_module_runs_adapted(make, TOKENS, call=over_time)


def test_attention():
    make = lambda: eqx.nn.MultiheadAttention(  # noqa: E731
        2, query_size=8, key_size=6, value_size=6, output_size=4, use_query_bias=True, key=KEY
    )
    mask = jnp.tri(5, 7, dtype=bool)
    call = lambda model, q, kv: model(q, kv, kv, mask=mask)  # noqa: E731
    assert_module_runs_adapted(make, TOKENS, data(7, 6), call=call)


def test_attention_with_rotated_heads():
    make = lambda: (  # noqa: E731
        eqx.nn.MultiheadAttention(2, 8, key=KEY),
        eqx.nn.RotaryPositionalEmbedding(4),
    )

    def call(model, x):
        attention, rotate = model
        heads = lambda q, k, v: (jax.vmap(rotate, 1, 1)(q), jax.vmap(rotate, 1, 1)(k), v)  # noqa: E731
        return attention(x, x, x, process_heads=heads)

    assert_module_runs_adapted(make, TOKENS, call=call)


@pytest.mark.parametrize("cell", ["GRUCell", pytest.param("LSTMCell", marks=pytest.mark.slow)])
def test_recurrence(cell):
    def scan(model, x):
        start = (jnp.zeros(6), jnp.zeros(6)) if cell == "LSTMCell" else jnp.zeros(6)
        return jax.lax.scan(lambda state, token: (model(token, state), None), start, x)[0]

    assert_module_runs_adapted(lambda: getattr(eqx.nn, cell)(8, 6, key=KEY), TOKENS, call=scan)


def test_convolutional_network():
    def make():
        layers = [
            eqx.nn.Conv2d(3, 8, 3, stride=2, padding=1, key=KEY),
            eqx.nn.GroupNorm(2, 8),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(8, 8, 3, padding="SAME", groups=4, dilation=2, key=KEY),
            eqx.nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1, key=KEY),
            eqx.nn.AvgPool2d(2, 2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(36, 3, key=KEY),
        ]
        return eqx.nn.Sequential(layers)

    assert_module_runs_adapted(make, IMAGE)


def test_layers_on_a_stack():
    """The documented way to scan over layers: a vmapped constructor, partitioned once more."""
    make = lambda: eqx.filter_vmap(  # noqa: E731
        lambda key: eqx.nn.MLP(8, 8, 12, depth=1, key=key)
    )(jax.random.split(KEY, 3))

    def call(layers, x):
        arrays, static = eqx.partition(layers, eqx.is_array)
        layer = eqx.filter_checkpoint(lambda each, x: x + eqx.combine(each, static)(x))
        step = lambda x, each: (layer(each, x), None)  # noqa: E731
        return jax.lax.scan(step, x, arrays)[0]

    assert_module_runs_adapted(make, TOKENS[0], call=call)


def test_embedding_with_its_own_head():
    def make():
        embedding, head = eqx.nn.Embedding(11, 8, key=KEY), eqx.nn.Linear(8, 11, key=KEY)
        return eqx.nn.Shared((embedding, head), lambda m: m[1].weight, lambda m: m[0].weight)

    def call(model, ids):
        embedding, head = model()
        return jax.vmap(head)(jax.vmap(embedding)(ids))

    # The table is looked up by a slice for each token, which vmap turns into a gather.
    assert_module_runs_adapted(make, jnp.array([1, 4, 10]), call=call)


def test_a_module_jitted_by_its_own_package():
    make = lambda: eqx.nn.MLP(8, 3, 12, depth=1, key=KEY)  # noqa: E731
    call = lambda model, x: eqx.filter_jit(functools.partial(over_time, model))(x)  # noqa: E731
    assert_module_runs_adapted(make, TOKENS, call=call)


def test_a_weight_divided_by_its_own_norm_is_formed():
    make = lambda: eqx.nn.WeightNorm(eqx.nn.Linear(8, 4, key=KEY))  # noqa: E731
    assert_module_runs_adapted(
        make, TOKENS, call=over_time, not_kernels=["g"], formed={"layer/weight": "mul"}
    )
