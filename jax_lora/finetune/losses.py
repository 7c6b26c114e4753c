"""Loss functions, one per task.

With the model bound, each is a loss function for `make_step` and `Trainer`:

    loss_fn = functools.partial(causal_lm_loss, model)
    loss_fn(variables, batch)  ->  (sum of losses, weight)

They return sums instead of means, because the number of targets differs between the parts of a
batch. They call the model with plain variables; `make_step` applies `lora_apply` to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora.data.collators import Batch, ClassificationBatch, MaskedBatch, Seq2SeqBatch
from jax_lora.models.head_sharding import share_head
from jax_lora.models.mesh_sharding import EXPERT, ROW_AXES
from jax_lora.transform.strategies import target_platform

# The most elements of a chunk of logits, if `chunk` is None: 64 MiB in float32 on a CPU. Each chunk
# reads all weights of the output layer, so larger chunks are faster. Accelerators have memory for
# 1 GiB: 2,048 tokens at a vocabulary of 128k, enough to be compute-bound.
MOST_LOGITS = 2**24
MOST_LOGITS_ACCELERATOR = 2**28

Array = jax.Array
Sums = tuple[Array, Array]  # (sum of losses, weight), both float32 scalars


def causal_lm_loss(
    model: Any, variables: Any, batch: Batch, *, chunk: int | None = None, devices: int = 1
) -> Sums:
    """Sum the cross-entropies of a batch's target tokens, for a decoder.

    Logits are computed for target tokens only. This saves most of the time and memory of the output
    layer if completions are short and prompts are long.

    Args:
      model: A decoder of `jax_lora.models`, or a module with the same `__call__` and `unembed`.
      variables: `{"params": params}`.
      batch: Padded or packed sequences.
      chunk: Number of tokens per chunk of logits; the backward pass recomputes them. None: as many
        as `MOST_LOGITS` allows on the model's platform. 0: all.
      devices: Number of devices that share the batch, if the model has no mesh. They also share a
        chunk, which can then have more tokens.

    Returns:
      The sum of the losses and the number of target tokens, both float32 scalars.
    """
    packed = {"positions": batch.positions, "segment_ids": batch.segments}
    given = {name: array for name, array in packed.items() if array is not None}
    hidden = model.apply(variables, batch.ids, **given, return_hidden=True)
    chosen = _gather(hidden, batch.at)  # (rows * targets, hidden)
    return _cross_entropy(model, variables, _unembed, chosen, batch, chunk, devices)


def masked_lm_loss(
    model: Any, variables: Any, batch: MaskedBatch, *, chunk: int | None = None, devices: int = 1
) -> Sums:
    """Sum the cross-entropies of the masked tokens, for an encoder.

    Args:
      model: An encoder of `jax_lora.models` with the head "masked_lm".
      variables: `{"params": params}`.
      batch: Padded sequences with masked tokens.
      chunk: As in `causal_lm_loss`.
      devices: As in `causal_lm_loss`.

    Returns:
      The sum of the losses and the number of masked tokens.
    """
    hidden = model.apply(variables, batch.ids, batch.mask, batch.types, return_hidden=True)
    chosen = _gather(hidden, batch.at)  # (rows * targets, hidden)
    unembed = lambda model, variables, x: _unembed(model, variables, x[None])[0]  # noqa: E731
    return _cross_entropy(model, variables, unembed, chosen, batch, chunk, devices)


def seq2seq_loss(
    model: Any, variables: Any, batch: Seq2SeqBatch, *, chunk: int | None = None, devices: int = 1
) -> Sums:
    """Sum the cross-entropies of the completions' tokens, for an encoder-decoder.

    Args:
      model: A T5 of `jax_lora.models`.
      variables: `{"params": params}`.
      batch: Padded prompts and completions.
      chunk: As in `causal_lm_loss`.
      devices: As in `causal_lm_loss`.

    Returns:
      The sum of the losses and the number of target tokens.
    """
    decoded = {"decoder_input_ids": batch.decoder_ids, "return_hidden": True}
    hidden = model.apply(variables, batch.ids, batch.mask, **decoded)  # (rows, targets, hidden)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _cross_entropy(model, variables, _unembed, flat, batch, chunk, devices)


def classification_loss(
    model: Any,
    variables: Any,
    batch: ClassificationBatch,
    *,
    chunk: int | None = None,
    devices: int = 1,
) -> Sums:
    """Sum the cross-entropies of the classes.

    Args:
      model: An encoder of `jax_lora.models` with the head "sequence_classification".
      variables: `{"params": params}`.
      batch: Padded texts, or pairs of texts, and their classes.
      chunk: Not used: logits of classes are small.
      devices: Not used.

    Returns:
      The sum of the losses and the number of examples.
    """
    logits = model.apply(variables, batch.ids, batch.mask, batch.types)  # (rows, classes)
    weights = jnp.asarray(batch.weights)
    return _weighted_sum(logits, jnp.asarray(batch.labels), weights), weights.sum()


def chunk_size(
    chunk: int | None, vocabulary: int, tokens: int, platform: str = "cpu", devices: int = 1
) -> int:
    """Return the number of tokens whose logits are in memory at the same time.

    Args:
      chunk: As in `causal_lm_loss`.
      vocabulary: Size of the vocabulary.
      tokens: Number of tokens of the batch, for a `chunk` of 0.
      platform: Platform of the model.
      devices: Number of devices that share a chunk.

    Example:
      >>> chunk_size(None, 128_256, 8192, "gpu")
      2048
    """
    if chunk is None:
        on_cpu = platform == "cpu"  # its devices share one memory
        most = (MOST_LOGITS if on_cpu else MOST_LOGITS_ACCELERATOR) // vocabulary
        return max(1, most - most % 128 if most > 128 else most) * (1 if on_cpu else devices)
    return chunk or tokens


def _unembed(model: Any, variables: Any, x: Array) -> Array:
    return model.apply(variables, x, method="unembed")


def _gather(hidden: Array, at: Any) -> Array:
    """Select positions: (rows, length, hidden), (rows, targets) -> (rows * targets, hidden)."""
    # Index within each row: indices into all tokens would gather the rows of all devices.
    chosen = jnp.take_along_axis(hidden, jnp.asarray(at)[..., None], axis=1)
    return chosen.reshape(-1, hidden.shape[-1])


def _cross_entropy(
    model: Any,
    variables: Any,
    unembed: Callable[[Any, Any, Array], Array],
    hidden: Array,
    batch: Any,
    chunk: int | None,
    devices: int,
) -> Sums:
    """Sum the weighted cross-entropies of tokens (tokens, hidden), with logits in chunks."""
    labels = jnp.asarray(batch.labels).reshape(-1)
    weights = jnp.asarray(batch.weights).reshape(-1)
    platform = getattr(model, "platform", None) or target_platform(())
    sizes = dict(getattr(getattr(model, "mesh", None), "shape", {}))
    sharing = max(devices, math.prod(sizes.values())) // sizes.get(EXPERT, 1)  # of the logits
    size = chunk_size(chunk, model.config.vocab_size, hidden.shape[0], platform, sharing)
    split = math.prod(sizes.get(name, 1) for name in ROW_AXES)
    size = -(-size // split) * split
    head = share_head(model, variables, hidden.shape[0])

    def loss_of(x: Array, labels: Array, weights: Array) -> Array:
        logits = unembed(model, head.variables, head.pin_hidden(x))
        return _weighted_sum(head.pin_logits(logits), labels, weights)

    if size >= labels.shape[0]:
        return loss_of(hidden, labels, weights), weights.sum()
    return _in_chunks(loss_of, size, hidden, labels, weights), weights.sum()


def _weighted_sum(logits: Array, labels: Array, weights: Array) -> Array:
    losses = _cross_entropies(logits.astype(jnp.float32), labels)
    # Padding has weight 0, but 0 times an infinite loss is NaN.
    return jnp.sum(jnp.where(weights > 0, losses * weights, jnp.zeros_like(losses)))


def _cross_entropies(logits: Array, labels: Array) -> Array:
    """Cross-entropy of each label: (..., classes) float32, (...) -> (...).

    The label's logit is selected with a mask: the gradient of indexing is a scatter, which needs
    one more float32 array of the size of the logits.
    """
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    chosen = jnp.sum(jnp.where(is_label, logits, jnp.zeros_like(logits)), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _in_chunks(loss_of: Any, size: int, hidden: Array, labels: Array, weights: Array) -> Array:
    """Sum the losses in chunks of `size` tokens; the last chunk is padded with weight 0.

    Each chunk has tokens from the whole batch, so that all devices share it: neighboring rows are
    on one device.
    """
    count = -(-labels.shape[0] // size)

    def cut(x: Array) -> Array:  # (tokens, ...) -> (chunks, size, ...)
        missing = count * size - x.shape[0]
        filled = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(size, count, *x.shape[1:]).swapaxes(0, 1)

    # prevent_cse is not needed inside a scan.
    recomputed = jax.checkpoint(loss_of, prevent_cse=False)
    add = lambda total, part: (total + recomputed(*part), None)  # noqa: E731
    return lax.scan(add, jnp.float32(0), (cut(hidden), cut(labels), cut(weights)))[0]
