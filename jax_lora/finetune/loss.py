"""The loss: cross-entropy of the learned tokens, every one of them with the same weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jax_lora.data.batches import Batch

# Logits in memory together, where nothing else is asked for: 64 MiB in float32.
MOST_LOGITS = 2**24


def summed_loss(
    model: Any, variables: Any, batch: Batch, *, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum the cross-entropies of a batch's learned tokens, in float32.

    Sums and not means, so that parts of a batch add up to the whole whatever their token counts.
    Logits are formed for the learned tokens only: with a short answer to a long prompt, and a
    vocabulary wider than the model, that is most of the output layer's work and memory. And only
    for so many of them at a time; the backward pass forms them again.

    Args:
      model: A decoder of `jax_lora.models`.
      variables: `{"params": params}`; call it through `lora_apply` for combined ones.
      batch: Padded or packed rows.
      chunk: Tokens whose logits are in memory together; None: as many as `MOST_LOGITS` allows,
        0: all.

    Returns:
      The sum of the losses and the number of learned tokens, both float32 scalars.
    """
    packed = {"positions": batch.positions, "segment_ids": batch.segments}
    given = {name: array for name, array in packed.items() if array is not None}
    hidden = model.apply(variables, batch.ids, **given, return_hidden=True)
    rows, length, width = hidden.shape
    first = jnp.arange(rows, dtype=jnp.int32)[:, None] * jnp.full_like(batch.at, length)
    flat = (first + batch.at).reshape(-1)  # (rows * learned,)
    chosen = hidden.reshape(rows * length, width)[flat]  # (rows * learned, hidden)
    labels, weights = jnp.asarray(batch.labels).reshape(-1), jnp.asarray(batch.weights).reshape(-1)

    def of(chosen: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
        logits = model.apply(variables, chosen, method="unembed")  # (tokens, vocabulary)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        # Padding has weight 0, but 0 times an overflow is no number: it is left out instead.
        return jnp.sum(jnp.where(weights > 0, losses * weights, jnp.zeros_like(losses)))

    size = chunk_size(chunk, model.config.vocab_size, labels.shape[0])
    if size >= labels.shape[0]:
        return of(chosen, labels, weights), weights.sum()
    return _in_chunks(of, size, chosen, labels, weights), weights.sum()


def chunk_size(chunk: int | None, vocabulary: int, tokens: int) -> int:
    """Say for how many tokens logits are in memory together: what `chunk` means."""
    if chunk is None:
        return max(1, MOST_LOGITS // vocabulary)
    return chunk or tokens


def _in_chunks(
    of: Any, size: int, chosen: jax.Array, labels: jax.Array, weights: jax.Array
) -> jax.Array:
    """Add up the losses of so many tokens at a time, filled up with tokens of weight 0.

    A chunk takes tokens from all over, as neighbouring rows lie on one device.
    """
    count = -(-labels.shape[0] // size)

    def cut(x: jax.Array) -> jax.Array:  # (tokens, ...) -> (chunks, size, ...)
        missing = count * size - x.shape[0]
        filled = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(size, count, *x.shape[1:]).swapaxes(0, 1)

    # Under the scan the loop itself keeps XLA from undoing the recomputation.
    again = jax.checkpoint(of, prevent_cse=False)
    add = lambda total, part: (total + again(*part), None)  # noqa: E731
    parts = (cut(chosen), cut(labels), cut(weights))
    return lax.scan(add, jnp.float32(0), parts)[0]
