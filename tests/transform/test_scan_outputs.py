"""Kernels that a scan returns stay factored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jax_lora as jl
from tests.lora_cases import adapt, assert_equals_merged, random_tree, randomized

X = jax.random.normal(jax.random.key(2), (3, 6))
TREE = {"w": random_tree((4, 6, 6)), "u": random_tree((6, 6))}


def step(x, w):
    return jnp.tanh(x @ w), w


def handed_back_unused(p, x):
    return lax.scan(step, x, p["w"])[0] @ p["u"]


def used_by_the_next_scan(p, x):
    x, ws = lax.scan(step, x, p["w"])
    x, ws = lax.scan(step, x, ws.swapaxes(1, 2))
    return lax.scan(step, x @ p["u"], ws)[0]


def used_one_by_one(p, x):
    x, ws = lax.scan(lambda x, w: (jnp.tanh(x @ w), 2 * w), x, p["w"])
    return x @ ws[1] @ ws[3].T @ p["u"]


def a_constant_for_every_step(p, x):
    x, us = lax.scan(lambda x, w: (jnp.tanh(x @ w), p["u"]), x, p["w"])
    return lax.scan(step, x, us)[0]


def nested(p, x):
    def block(x, ws):
        return lax.scan(step, x, ws)

    x, ws = lax.scan(block, x, p["w"].reshape(2, 2, 6, 6))
    return lax.scan(block, x, ws)[0] @ p["u"]


def rows_of_a_kernel(p, x):
    x, rows = lax.scan(lambda x, w: (jnp.tanh(x @ w), w[0]), x, p["w"])
    return x @ rows.T @ p["w"][0][:4] @ p["u"]


PROGRAMS = [
    handed_back_unused,
    used_by_the_next_scan,
    used_one_by_one,
    a_constant_for_every_step,
    nested,
    rows_of_a_kernel,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_kernels_that_a_scan_hands_out_stay_in_factors(program):
    adapter = adapt(handed_back_unused, TREE, X)  # a pair for every layer
    assert set(adapter.pairs) == {"w", "u"}
    assert_equals_merged(program, TREE, X, adapter=adapter)


def test_each_step_drops_inputs_of_its_own_where_its_kernel_is_used():
    tree = {"w": jnp.zeros((4, 6, 6))}
    kernels = jl.find_kernels(lambda p, x: lax.scan(step, x, p["w"])[0], tree, X)
    config = jl.LoraConfig(rank=2, targets="w", dropout=0.5)
    adapter = randomized(jl.lora_init(jax.random.key(0), tree, config, kernels=kernels))
    adapter = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), adapter)

    def program(p, x):
        ws = lax.scan(lambda c, w: (c, w), 0.0, p["w"])[1]
        return lax.scan(lambda c, w: (c, x @ w), 0.0, ws)[1]  # (layers, tokens, out)

    dropped = jl.dropout(jl.combine(tree, adapter), jax.random.key(1))
    layers = jl.lora_apply(program, on_materialize="error")(dropped, jnp.ones((3, 6)))
    assert all((layers[i] != layers[j]).any() for i in range(4) for j in range(i))
