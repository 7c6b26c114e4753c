"""The loss: cross-entropy of the learned tokens, every one of them with the same weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_lora.data.batches import Batch


def summed_loss(model: Any, variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum the cross-entropies of a batch's learned tokens, in float32.

    Sums and not means, so that parts of a batch add up to the whole whatever their token counts.
    Logits are formed for the learned tokens only: with a short answer to a long prompt, and a
    vocabulary wider than the model, that is most of the output layer's work and memory.

    Args:
      model: A decoder of `jax_lora.models`.
      variables: `{"params": params}`; call it through `lora_apply` for combined ones.
      batch: Padded rows.

    Returns:
      The sum of the losses and the number of learned tokens, both float32 scalars.
    """
    hidden = model.apply(variables, batch.ids, return_hidden=True)  # (rows, length, hidden)
    rows, length, width = hidden.shape
    first = jnp.arange(rows, dtype=jnp.int32)[:, None] * jnp.full_like(batch.at, length)
    flat = (first + batch.at).reshape(-1)  # (rows * learned,)
    chosen = hidden.reshape(rows * length, width)[flat]  # (rows * learned, hidden)
    logits = model.apply(variables, chosen, method="unembed")  # (rows * learned, vocabulary)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), batch.labels.reshape(-1)
    )
    # Padding has weight 0, but 0 times an overflow is no number: it is left out instead.
    weights = batch.weights.reshape(-1)
    total = jnp.sum(jnp.where(weights > 0, losses * weights, jnp.zeros_like(losses)))
    return total, weights.sum()
