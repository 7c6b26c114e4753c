"""Haiku's own modules and networks, transformed to pure functions as usual."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from haiku import experimental

from tests.foreign.model_cases import assert_runs_adapted, data, drawn

TOKENS = data(2, 5, 8)  # (batch, time, features)
IMAGE = data(4, 12, 12, 3)  # (batch, height, width, channels)

pytestmark = pytest.mark.usefixtures("usual_promotion")


def assert_network_runs_adapted(build, *args, init=None, **expected):
    network = hk.without_apply_rng(hk.transform_with_state(build))
    initial = hk.transform_with_state(init or build).init
    params, state = drawn(jax.eval_shape(initial, jax.random.key(0), *args))
    assert_runs_adapted(network.apply, params, state, *args, **expected)


def test_attention():
    def build(x, memory):
        initializer = hk.initializers.VarianceScaling(1.0)
        attention = hk.MultiHeadAttention(2, key_size=4, model_size=8, w_init=initializer)
        return attention(x, memory, memory)

    assert_network_runs_adapted(build, TOKENS, data(2, 7, 6))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "core", ["LSTM", "GRU", *(pytest.param(n, marks=SLOW) for n in ("VanillaRNN", "DeepRNN"))]
)
@pytest.mark.parametrize("unroll", ["dynamic_unroll", pytest.param("static_unroll", marks=SLOW)])
def test_recurrence(core, unroll):
    def build(x):
        make = lambda: hk.DeepRNN([hk.Linear(7), jax.nn.relu, hk.LSTM(6), hk.GRU(5)])  # noqa: E731
        module = make() if core == "DeepRNN" else getattr(hk, core)(6)
        return getattr(hk, unroll)(module, x, module.initial_state(len(x)), time_major=False)

    assert_network_runs_adapted(build, TOKENS[:, :2])


def test_recurrence_of_convolutions():
    def build(x):
        core = hk.Conv1DLSTM(input_shape=(5,), output_channels=4, kernel_shape=3)
        return hk.dynamic_unroll(core, x, core.initial_state(2), time_major=False)

    assert_network_runs_adapted(build, data(2, 3, 5, 3))


def residual_network(version_2, training):
    def build(x):
        network = hk.nets.ResNet(
            (1, 0, 1, 0),
            num_classes=4,
            resnet_v2=version_2,
            bottleneck=version_2,
            channels_per_group=(8, 8, 8, 8),
            strides=(1, 1, 2, 1),
            bn_config={"decay_rate": 0.9},
        )
        return network(x, is_training=training)

    return build


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version_2", "training"), [(False, True), (True, False)], ids=["v1 training", "v2"]
)
def test_residual_network(version_2, training):
    build, init = residual_network(version_2, training), residual_network(version_2, True)
    assert_network_runs_adapted(build, IMAGE, init=init)


def test_depthwise_network():
    def build(x):
        x = hk.SeparableDepthwiseConv2D(2, (3, 3), 6)(x)  # pyright: ignore[reportPrivateImportUsage]
        return hk.DepthwiseConv2D(1, (3, 3))(jax.nn.relu(x))

    assert_network_runs_adapted(build, IMAGE)


def test_layers_on_a_stack():
    def build(ids):
        def layer(x):
            h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
            return x + hk.nets.MLP([12, 8], activation=jax.nn.gelu)(h)

        embed = hk.Embed(11, 8)
        x = hk.remat(experimental.layer_stack(3)(layer))(embed(ids))
        return x @ embed.embeddings.T

    assert_network_runs_adapted(build, jnp.array([[1, 4, 10]]))


def test_a_weight_divided_by_its_largest_singular_value_stays_in_factors():
    def build(x):
        w = hk.get_parameter("w", (8, 4), init=jnp.ones)
        return x @ hk.SpectralNorm()(w, update_stats=False)

    assert_network_runs_adapted(build, TOKENS)
