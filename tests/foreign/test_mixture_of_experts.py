"""A mixture of experts: tokens are sorted by expert, and each expert multiplies its own rows."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.foreign.model_cases import assert_runs_adapted, data, drawn

EXPERTS, TOP, D, HIDDEN = 4, 2, 8, 6
TOKENS = data(10, D)  # (tokens, features)


class Experts(nn.Module):
    """Gated experts behind a router that picks the best `TOP` of them for every token."""

    grouped: bool

    @nn.compact
    def __call__(self, x):  # (tokens, d) -> (tokens, d)
        weights, chosen = jax.lax.top_k(
            nn.softmax(nn.Dense(EXPERTS, use_bias=False, name="router")(x)), TOP
        )
        init = nn.initializers.lecun_normal(batch_axis=0)
        gate = self.param("gate", init, (EXPERTS, D, HIDDEN))
        up = self.param("up", init, (EXPERTS, D, HIDDEN))
        down = self.param("down", init, (EXPERTS, HIDDEN, D))
        apply = sorted_by_expert if self.grouped else every_expert
        return apply(x, weights, chosen, gate, up, down)


def sorted_by_expert(x, weights, chosen, gate, up, down):
    order = jnp.argsort(chosen.ravel())
    sizes = jnp.bincount(chosen.ravel(), length=EXPERTS)
    rows = x[order // TOP]  # (tokens * top, d)
    hidden = nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jax.lax.ragged_dot(hidden, down, sizes) * weights.ravel()[order][:, None]
    return jnp.zeros_like(x).at[order // TOP].add(out)


def every_expert(x, weights, chosen, gate, up, down):
    hidden = nn.silu(jnp.einsum("td,edh->teh", x, gate)) * jnp.einsum("td,edh->teh", x, up)
    out = jnp.einsum("teh,ehd->ted", hidden, down)
    share = (jax.nn.one_hot(chosen, EXPERTS) * weights[..., None]).sum(1)  # (tokens, experts)
    return jnp.einsum("ted,te->td", out, share)


@pytest.mark.parametrize("grouped", [True, False], ids=["ragged_dot", "einsum"])
def test_mixture_of_experts(grouped):
    module = Experts(grouped)
    variables = drawn(jax.eval_shape(module.init, jax.random.key(0), TOKENS))
    assert_runs_adapted(module.apply, variables, TOKENS)
