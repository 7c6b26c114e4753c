"""Loss functions: one per task, each a plain function to read and replace.

With the model bound, each is what `make_step` and `Trainer` accept:

    loss_fn = functools.partial(causal_lm_loss, model)
    loss_fn(variables, batch)  ->  (sum of losses, weight)

They return sums instead of means, so that the parts of a batch add up to the whole, however many
targets each part has. They are written for plain variables: `make_step` applies `lora_apply`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jax_lora.data.collators import Batch, ClassificationBatch, MaskedBatch, Seq2SeqBatch

# The largest array of logits without an explicit `chunk`: 64 MiB in float32.
MOST_LOGITS = 2**24

Array = jax.Array
Sums = tuple[Array, Array]  # (sum of losses, weight), both float32 scalars


def causal_lm_loss(model: Any, variables: Any, batch: Batch, *, chunk: int | None = None) -> Sums:
    """Sum the cross-entropies of a batch's target tokens, for a decoder.

    Logits are computed for target tokens only. With a short completion after a long prompt, and a
    vocabulary wider than the model, that saves most of the output layer's work and memory.

    Args:
      model: A decoder of `jax_lora.models`, or a module with the same `__call__` and `unembed`.
      variables: `{"params": params}`.
      batch: Padded or packed sequences.
      chunk: Tokens whose logits are in memory together; the backward pass computes them again.
        None: as many as `MOST_LOGITS` allows. 0: all.

    Returns:
      The sum of the losses and the number of target tokens, both float32 scalars.
    """
    packed = {"positions": batch.positions, "segment_ids": batch.segments}
    given = {name: array for name, array in packed.items() if array is not None}
    hidden = model.apply(variables, batch.ids, **given, return_hidden=True)
    chosen = _gather(hidden, batch.at)  # (rows * targets, hidden)
    unembed = lambda x: model.apply(variables, x, method="unembed")  # noqa: E731
    return _cross_entropy(model, unembed, chosen, batch, chunk)


def masked_lm_loss(
    model: Any, variables: Any, batch: MaskedBatch, *, chunk: int | None = None
) -> Sums:
    """Sum the cross-entropies of the masked tokens, for an encoder.

    Args:
      model: An encoder of `jax_lora.models` with the head "masked_lm".
      variables: `{"params": params}`.
      batch: Padded sequences, in which some tokens are masked.
      chunk: As in `causal_lm_loss`.

    Returns:
      The sum of the losses and the number of masked tokens.
    """
    hidden = model.apply(variables, batch.ids, batch.mask, batch.types, return_hidden=True)
    chosen = _gather(hidden, batch.at)  # (rows * targets, hidden)
    head = lambda x: model.apply(variables, x[None], method="unembed")[0]  # noqa: E731
    return _cross_entropy(model, head, chosen, batch, chunk)


def seq2seq_loss(
    model: Any, variables: Any, batch: Seq2SeqBatch, *, chunk: int | None = None
) -> Sums:
    """Sum the cross-entropies of the completions' tokens, for an encoder-decoder.

    Args:
      model: A T5 of `jax_lora.models`.
      variables: `{"params": params}`.
      batch: Padded prompts and completions.
      chunk: As in `causal_lm_loss`.

    Returns:
      The sum of the losses and the number of target tokens.
    """
    hidden = model.apply(
        variables,
        batch.ids,
        batch.mask,
        decoder_input_ids=batch.decoder_ids,
        return_hidden=True,
    )  # (rows, targets, hidden)
    flat = hidden.reshape(-1, hidden.shape[-1])
    unembed = lambda x: model.apply(variables, x, method="unembed")  # noqa: E731
    return _cross_entropy(model, unembed, flat, batch, chunk)


def classification_loss(
    model: Any, variables: Any, batch: ClassificationBatch, *, chunk: int | None = None
) -> Sums:
    """Sum the cross-entropies of the classes.

    Args:
      model: An encoder of `jax_lora.models` with the head "sequence_classification".
      variables: `{"params": params}`.
      batch: Padded texts, or pairs of texts, and their classes.
      chunk: Not used: logits of classes are small.

    Returns:
      The sum of the losses and the number of examples.
    """
    logits = model.apply(variables, batch.ids, batch.mask, batch.types)  # (rows, classes)
    weights = jnp.asarray(batch.weights)
    return _summed(logits, jnp.asarray(batch.labels), weights), weights.sum()


def chunk_size(chunk: int | None, vocabulary: int, tokens: int) -> int:
    """Return for how many tokens logits are in memory together under a setting of `chunk`."""
    if chunk is None:
        return max(1, MOST_LOGITS // vocabulary)
    return chunk or tokens


def _gather(hidden: Array, at: Any) -> Array:
    """Select positions: (rows, length, hidden), (rows, targets) -> (rows * targets, hidden)."""
    rows, length, width = hidden.shape
    first = jnp.arange(rows, dtype=jnp.int32)[:, None] * jnp.full_like(at, length)
    return hidden.reshape(rows * length, width)[(first + at).reshape(-1)]


def _cross_entropy(
    model: Any, head: Callable[[Array], Array], hidden: Array, batch: Any, chunk: int | None
) -> Sums:
    """Sum the weighted cross-entropies of tokens (tokens, hidden), with logits in chunks."""
    labels = jnp.asarray(batch.labels).reshape(-1)
    weights = jnp.asarray(batch.weights).reshape(-1)
    size = chunk_size(chunk, model.config.vocab_size, hidden.shape[0])
    of = lambda x, labels, weights: _summed(head(x), labels, weights)  # noqa: E731
    if size >= labels.shape[0]:
        return of(hidden, labels, weights), weights.sum()
    return _in_chunks(of, size, hidden, labels, weights), weights.sum()


def _summed(logits: Array, labels: Array, weights: Array) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    # Padding has weight 0, but 0 times an infinite loss is NaN: it is left out instead.
    return jnp.sum(jnp.where(weights > 0, losses * weights, jnp.zeros_like(losses)))


def _in_chunks(of: Any, size: int, hidden: Array, labels: Array, weights: Array) -> Array:
    """Add up the losses of `size` tokens at a time; the last chunk is filled with weight 0.

    Each chunk takes tokens from all over the batch, because neighboring rows are on one device.
    """
    count = -(-labels.shape[0] // size)

    def cut(x: Array) -> Array:  # (tokens, ...) -> (chunks, size, ...)
        missing = count * size - x.shape[0]
        filled = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(size, count, *x.shape[1:]).swapaxes(0, 1)

    # Under the scan the loop itself keeps XLA from undoing the recomputation.
    again = jax.checkpoint(of, prevent_cse=False)
    add = lambda total, part: (total + again(*part), None)  # noqa: E731
    return lax.scan(add, jnp.float32(0), (cut(hidden), cut(labels), cut(weights)))[0]
