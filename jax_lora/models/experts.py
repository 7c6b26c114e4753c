"""A mixture of experts: a feed-forward block of many experts, a few of them for each token.

The kernels of all experts are one stack. Tokens are sorted by expert, so that each expert's tokens
are contiguous and one `jax.lax.ragged_dot` multiplies every group by its own kernel: only the
chosen experts are computed, and no token is dropped, even if all choose one expert.

The router is an ordinary dense kernel, which `find_kernels` finds. "all-linear" and "mlp" adapt
every expert and not the router; the pattern "gate" adapts it.

JAX 0.10 cannot `vmap` a `ragged_dot` over tokens that share its kernels, so with these models use
`jax.lax.map` for a different adapter per example.

Reference:
    Shazeer et al. (arXiv:1701.06538), section 2; Jiang et al., Mixtral (arXiv:2401.04088).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.checkpoint_model import linear
from jax_lora.models.decoder_config import DecoderConfig, ExpertSizes
from jax_lora.models.layout import Layout, Placement


class ExpertNames(NamedTuple):
    """Names in the files: of a layer's feed-forward block, and of the kernels of one expert."""

    block: str
    gate: str
    up: str
    down: str


class SparseMLP(nn.Module):
    """A router, and experts that are each a gated feed-forward block without biases."""

    config: DecoderConfig
    param_dtype: Any
    sizes: ExpertSizes

    def setup(self):  # noqa: D102  Linen's hook
        self.gate = linear(self.config, self.sizes.total, False, self.param_dtype)
        self.expert_stack = Experts(self.config, self.param_dtype, self.sizes, name="experts")

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, tokens, hidden) -> the same shape."""
        weights, indices = route(self.gate(x), self.sizes.per_token, self.sizes.normalized)
        return self.expert_stack(x, weights, indices)


class Experts(nn.Module):
    """The experts: down(act(gate(x)) * up(x)), with gate and up side by side in one kernel."""

    config: DecoderConfig
    param_dtype: Any
    sizes: ExpertSizes

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array, indices: jax.Array) -> jax.Array:
        """Apply each token's experts to x, (batch, tokens, hidden), and sum their outputs.

        Weights and indices are (batch, tokens, per_token), from `route`.
        """
        count, width = self.sizes.total, self.sizes.width
        initial = nn.initializers.normal(self.config.initializer_range)
        shapes = {
            "gate_up_proj": (count, x.shape[-1], 2 * width),
            "down_proj": (count, width, x.shape[-1]),
        }
        gate_up, down = (
            self.param(name, initial, shape, self.param_dtype).astype(x.dtype)
            for name, shape in shapes.items()
        )
        visits = indices.reshape(-1)  # (batch * tokens * per_token,), which expert
        order = jnp.argsort(visits)  # stable: the visits to expert 0 first, in order of tokens
        sizes = jnp.zeros(count, jnp.int32).at[visits].add(1)
        per_token = indices.shape[-1]
        sorted_x = x.reshape(-1, x.shape[-1])[order // per_token]  # (visits, hidden)
        inner = checkpoint_name(jax.lax.ragged_dot(sorted_x, gate_up, sizes), "gate")
        gate, up = jnp.split(inner, 2, axis=-1)
        hidden = ACTIVATIONS[self.config.hidden_act](gate) * up  # (visits, width)
        # The router's gradient reads the experts' outputs.
        y = checkpoint_name(jax.lax.ragged_dot(hidden, down, sizes), "expert_output")
        y = y[jnp.argsort(order)].reshape(*indices.shape, -1)  # (b, t, per_token, hidden)
        return jnp.einsum("btc,btch->bth", weights, y.astype(jnp.float32)).astype(x.dtype)


def route(logits: jax.Array, per_token: int, normalized: bool) -> tuple[jax.Array, jax.Array]:
    """Choose the most probable experts of every token from logits (..., experts).

    Return float32 weights (..., per_token), which sum to 1 if `normalized`, and the experts'
    indices.

    Example:
      >>> import jax.numpy as jnp
      >>> weights, indices = route(jnp.array([[0.0, 2.0, 1.0]]), 2, True)
      >>> indices.tolist()
      [[1, 2]]
      >>> weights.shape
      (1, 2)
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, indices = jax.lax.top_k(probabilities, per_token)  # (..., per_token)
    if normalized:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights, indices


def expert_layout(names: ExpertNames) -> Layout:
    """Place router and experts; the files hold each expert's three kernels separately."""
    files, module = f"model.layers.{{layer}}.{names.block}", "model.layers.{layer}.mlp"
    gate, up, down = (
        f"{files}.experts.{{expert}}.{name}.weight" for name in (names.gate, names.up, names.down)
    )

    # Router and experts are not torch `Linear` modules, so adapters name the parameter itself.
    def placed(name: str, *tensors: str) -> Placement:
        return Placement(tensors, True, f"{module}.{name}")

    return {
        "layers/mlp/gate/kernel": placed("gate.weight", f"{files}.gate.weight"),
        "layers/mlp/experts/gate_up_proj": placed("experts.gate_up_proj", gate, up),
        "layers/mlp/experts/down_proj": placed("experts.down_proj", down),
    }
