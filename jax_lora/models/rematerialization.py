"""What a layer keeps for its backward pass, by name: `none`, `names`, `full`.

none    XLA keeps every intermediate array that the backward pass reads
names   queries, keys, values, the attention kernel's outputs, the inputs of both blocks of a layer
        and the feed-forward block's products are kept; norms, activations and rotary embedding are
        computed again. No matmul and no attention kernel runs twice.
full    only the input of each layer is kept; the layer runs twice

The same policy serves any model that names its arrays with `jax.ad_checkpoint.checkpoint_name`:

    layer = jax.checkpoint(layer, policy=jl.models.remat_policy("names"))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jax_lora.algebra.factored_product import DOWN_PROJECTION

REMAT = ("none", "names", "full")

SAVED_NAMES = (
    "query",
    "key",
    "value",
    "attention_output",
    "attention_logsumexp",
    "attention_block",
    "gate",
    "up",
    "mlp_block",
    "expert_output",
    DOWN_PROJECTION,
)

# JAX names no outputs of cuDNN's attention, whose log-sum-exp only a policy over primitives sees.
_KERNEL = "dot_product_attention_fwd"


def remat_policy(remat: str) -> Callable[..., Any] | None:
    """Return the policy of `jax.checkpoint` that the models of this package use.

    Use it for the layers of your own model, whose arrays are named with
    `jax.ad_checkpoint.checkpoint_name`. `"names"` keeps the arrays named query, key, value, gate,
    up, attention_block and mlp_block (the outputs of both blocks of a layer), the low-rank
    products of `lora_apply`, and the outputs of fused attention kernels; everything else is
    computed again in the backward pass.

    Args:
      remat: `"names"` or `"full"`; `"none"` needs no `jax.checkpoint`.

    Returns:
      The policy; None, which keeps nothing, for `"full"`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> layer = lambda x: jnp.sin(checkpoint_name(jnp.cos(x), "query"))
      >>> layer = jax.checkpoint(layer, policy=remat_policy("names"))
      >>> float(jax.grad(layer)(0.0))
      -0.0
    """
    if remat == "full":
        return None
    named = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        return primitive.name.startswith(_KERNEL) or named(primitive, *args, **params)

    return policy
