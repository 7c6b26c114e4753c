"""A feed-forward part of many experts, of which each token visits a few.

The kernels of all experts are one stack. Tokens are sorted by expert, so that each expert's tokens
stand together and one `jax.lax.ragged_dot` multiplies every group by its own kernel: the work is
that of the experts chosen, and no token is dropped whatever the load.

The router is an ordinary dense kernel: `find_kernels` finds it and "all-linear" adapts it, as PEFT
does for these models. `exclude="gate"` leaves it alone.

JAX 0.10 cannot `vmap` a `ragged_dot` over tokens that share its kernels, so an adapter for each row
of a batch goes through `jax.lax.map` with these models.

Reference:
    Shazeer et al. (arXiv:1701.06538), section 2; Jiang et al., Mixtral (arXiv:2401.04088).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.attention import linear
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.layout import Layout, Placement, dense

__all__ = ["SparseMLP", "route", "sparse_layout"]


class SparseMLP(nn.Module):
    """A router, and experts that are each a gated feed-forward part without biases.

    Attributes:
      config: sizes of the model.
      param_dtype: dtype that `init` gives the parameters.
      experts: how many there are.
      chosen: how many each token visits.
      width: intermediate channels of one expert.
      normalised: whether the weights of a token's experts are made to sum to 1.
    """

    config: DecoderConfig
    param_dtype: Any
    experts: int
    chosen: int
    width: int
    normalised: bool

    def setup(self):  # noqa: D102  Linen's hook
        self.gate = linear(self.config, self.experts, False, self.param_dtype)
        self.expert_stack = Experts(
            self.config, self.param_dtype, self.experts, self.width, name="experts"
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, hidden) -> the same shape."""
        weights, indices = route(self.gate(x), self.chosen, self.normalised)
        return self.expert_stack(x, weights, indices)


class Experts(nn.Module):
    """The experts' kernels: down(act(gate(x)) * up(x)), with gate and up side by side in one."""

    config: DecoderConfig
    param_dtype: Any
    experts: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array, indices: jax.Array) -> jax.Array:
        """Send each token to its experts and add up what they say.

        Args:
          x: (batch, tokens, hidden).
          weights: (batch, tokens, chosen) float32.
          indices: (batch, tokens, chosen) int32, each token's experts.

        Returns:
          (batch, tokens, hidden), in x's dtype.
        """
        initial = nn.initializers.normal(self.config.initializer_range)
        shapes = {
            "gate_up_proj": (self.experts, x.shape[-1], 2 * self.width),
            "down_proj": (self.experts, self.width, x.shape[-1]),
        }
        gate_up, down = (
            self.param(name, initial, shape, self.param_dtype).astype(x.dtype)
            for name, shape in shapes.items()
        )
        chosen = indices.shape[-1]
        visits = indices.reshape(-1)  # (batch * tokens * chosen,), which expert
        order = jnp.argsort(visits)  # stable: the visits to expert 0 first, in order of tokens
        sizes = jnp.zeros(self.experts, jnp.int32).at[visits].add(1)
        rows = x.reshape(-1, x.shape[-1])[order // chosen]  # (visits, hidden), sorted by expert
        gate, up = jnp.split(jax.lax.ragged_dot(rows, gate_up, sizes), 2, axis=-1)
        hidden = ACTIVATIONS[self.config.hidden_act](gate) * up  # (visits, width)
        said = jax.lax.ragged_dot(hidden, down, sizes)  # (visits, hidden)
        said = said[jnp.argsort(order)].reshape(*indices.shape, -1)  # by token again
        return jnp.einsum("btc,btch->bth", weights, said.astype(jnp.float32)).astype(x.dtype)


def route(logits: jax.Array, chosen: int, normalised: bool) -> tuple[jax.Array, jax.Array]:
    """Choose the most probable experts of every token.

    Args:
      logits: (..., experts).
      chosen: how many each token visits.
      normalised: whether their weights are made to sum to 1.

    Returns:
      Weights (..., chosen), always float32, and the experts' indices, of the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> weights, indices = route(jnp.array([[0.0, 2.0, 1.0]]), 2, True)
      >>> indices.tolist()
      [[1, 2]]
      >>> weights.shape
      (1, 2)
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, indices = jax.lax.top_k(probabilities, chosen)  # (..., chosen)
    if normalised:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights, indices


def sparse_layout(part: str, gate: str, up: str, down: str) -> Layout:
    """Place router and experts, whose files hold each expert's three kernels apart.

    Args:
      part: Name of the feed-forward part in the files; modules call it "mlp".
      gate: Names of an expert's kernels in the files.
      up: See `gate`.
      down: See `gate`.
    """
    files, modules = f"model.layers.{{layer}}.{part}", "model.layers.{layer}.mlp"
    expert = f"{files}.experts.{{expert}}"
    router = dense("layers/mlp/gate", f"{files}.gate")["layers/mlp/gate/kernel"]
    return {
        # Router and experts are no modules of torch's `Linear`, so adapters name the parameter.
        "layers/mlp/gate/kernel": Placement(router.tensors, True, f"{modules}.gate.weight"),
        "layers/mlp/experts/gate_up_proj": Placement(
            (f"{expert}.{gate}.weight", f"{expert}.{up}.weight"),
            True,
            f"{modules}.experts.gate_up_proj",
        ),
        "layers/mlp/experts/down_proj": Placement(
            (f"{expert}.{down}.weight",), True, f"{modules}.experts.down_proj"
        ),
    }
