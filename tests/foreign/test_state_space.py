"""A selective state-space block, its recurrence run in parallel and step by step."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.foreign.model_cases import assert_runs_adapted, data, drawn

D, INNER, STATE, RANK = 6, 8, 4, 3
TOKENS = data(2, 5, D)  # (batch, time, features)


def in_parallel(decay, inflow):
    """All states of h_t = decay_t * h_(t-1) + inflow_t, (batch, time, inner, state)."""
    join = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])  # noqa: E731
    return jax.lax.associative_scan(join, (decay, inflow), axis=1)[1]


def step_by_step(decay, inflow):
    def step(h, each):
        h = each[0] * h + each[1]
        return h, h

    over_time = jax.tree.map(lambda array: array.swapaxes(0, 1), (decay, inflow))
    return jax.lax.scan(step, jnp.zeros_like(inflow[:, 0]), over_time)[1].swapaxes(0, 1)


class SelectiveStateSpace(nn.Module):
    """Gate, causal depth-wise convolution, and a recurrence whose decay the input chooses."""

    recur: object

    @nn.compact
    def __call__(self, x):
        h, gate = jnp.split(nn.Dense(2 * INNER, use_bias=False, name="in_proj")(x), 2, axis=-1)
        h = nn.Conv(INNER, (3,), padding=((2, 0),), feature_group_count=INNER, name="conv")(h)
        h = nn.silu(h)
        mixed = nn.Dense(RANK + 2 * STATE, use_bias=False, name="x_proj")(h)
        step, write, read = jnp.split(mixed, (RANK, RANK + STATE), axis=-1)
        step = nn.softplus(nn.Dense(INNER, name="dt_proj")(step))[..., None]
        log_decay = self.param("A_log", nn.initializers.ones, (INNER, STATE))
        skip = self.param("D", nn.initializers.ones, (INNER,))
        decay = jnp.exp(-step * jnp.exp(log_decay)[None, None])  # (batch, time, inner, state)
        states = self.recur(decay, step * write[:, :, None] * h[..., None])
        y = jnp.einsum("btis,bts->bti", states, read) + skip[None, None] * h
        return nn.Dense(D, use_bias=False, name="out_proj")(y * nn.silu(gate))


@pytest.mark.parametrize(
    "recur",
    [pytest.param(in_parallel, marks=pytest.mark.slow), step_by_step],
    ids=lambda recur: recur.__name__,
)
def test_state_space_block(recur):
    module = SelectiveStateSpace(recur)
    variables = drawn(jax.eval_shape(module.init, jax.random.key(0), TOKENS))
    assert_runs_adapted(module.apply, variables, TOKENS, not_kernels=["params/A_log"])
