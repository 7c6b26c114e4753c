"""Predictions of models with an encoder: classes of texts, tokens behind masks, completions."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.data.batches import Batches
from jax_lora.data.collators import pad_sequences
from jax_lora.data.encoder_tokenizer import EncoderTokenizer
from jax_lora.finetune.tasks import end_tokens, longest_input
from jax_lora.models.decoding import end_mask
from jax_lora.transform import lora_apply

LENGTH_MULTIPLE = 16  # prompts are padded to a multiple, so that few lengths are compiled


class Prediction(NamedTuple):
    """The class of a text.

    Attributes:
      line: The example's line in its file.
      number: Index of the most probable class.
      probabilities: (classes,) float32.
    """

    line: int
    number: int
    probabilities: np.ndarray


def predict_classes(model: Any, variables: Any, batches: Batches) -> list[Prediction]:
    """Classify examples.

    Args:
      model: A classifier of `jax_lora.models`.
      variables: `{"params": params}`, with an adapter or without.
      batches: From `make_batches`.

    Returns:
      A prediction for each example, in the order of the file.
    """
    predictions = []
    for batch, lines in _with_lines(batches):
        found = np.asarray(_probabilities(model, variables, batch))
        for line, row in zip(lines, found, strict=False):  # the rest fills the batch up
            predictions.append(Prediction(line, int(row.argmax()), row))
    return sorted(predictions, key=lambda each: each.line)


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(model: Any, variables: Any, batch: Any) -> jax.Array:
    apply = lora_apply(model.apply)
    logits = apply(variables, batch.ids, batch.mask, batch.types)  # (rows, classes)
    return jax.nn.softmax(logits.astype(jnp.float32))


def masked_accuracy(model: Any, variables: Any, batches: Batches) -> float:
    """Return the share of masked tokens that the model finds."""
    right = weight = 0.0
    for batch in batches.once():
        found, count = _masked_hits(model, variables, batch)
        right, weight = right + float(found), weight + float(count)
    return right / max(weight, 1.0)


@functools.partial(jax.jit, static_argnums=0)
def _masked_hits(model: Any, variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    logits = lora_apply(model.apply)(variables, batch.ids, batch.mask, batch.types)
    chosen = jnp.take_along_axis(logits, batch.at[:, :, None], axis=1)  # (rows, targets, vocab)
    right = (jnp.argmax(chosen, axis=-1) == batch.labels) * batch.weights
    return right.sum(), batch.weights.sum()


class Fill(NamedTuple):
    """A candidate for a mask token: its text, and its probability."""

    text: str
    probability: float


def fill_masks(
    model: Any, variables: Any, tokenizer: EncoderTokenizer, text: str, *, top: int = 5
) -> list[list[Fill]]:
    """Find the most probable tokens for every mask token of a text.

    Args:
      model: A masked language model of `jax_lora.models`.
      variables: `{"params": params}`, with an adapter or without.
      tokenizer: The model's tokenizer.
      text: A text with mask tokens, such as `[MASK]`.
      top: How many candidates for each.

    Returns:
      For each mask token its candidates, the most probable first.
    """
    most = longest_input(model)
    ids = tokenizer.encode(text, max_length=most).ids
    padded, mask = _few_lengths(model, [ids])
    probabilities = np.asarray(_token_probabilities(model, variables, padded, mask))[0]
    fills = []
    for place in np.flatnonzero(ids == tokenizer.mask_id):
        best = np.argsort(-probabilities[place], kind="stable")[:top]
        row = probabilities[place]
        fills.append([Fill(tokenizer.decode([int(i)]), float(row[i])) for i in best])
    return fills


@functools.partial(jax.jit, static_argnums=0)
def _token_probabilities(model: Any, variables: Any, ids: Any, mask: Any) -> jax.Array:
    logits = lora_apply(model.apply)(variables, ids, mask)
    return jax.nn.softmax(logits.astype(jnp.float32))


def complete(
    model: Any,
    variables: Any,
    tokenizer: EncoderTokenizer,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int = 64,
    rows: int = 16,
) -> list[str]:
    """Write the completions of prompts with an encoder-decoder, the likeliest token every time.

    Args:
      model: A T5 of `jax_lora.models`.
      variables: `{"params": params}`, with an adapter or without.
      tokenizer: The model's tokenizer.
      prompts: (tokens,) int32 each.
      max_tokens: The most tokens of a completion.
      rows: Prompts that are completed together.

    Returns:
      The texts, in the order of the prompts.
    """
    stop = jnp.asarray(end_mask(model, end_tokens(model)))
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        filled = chosen + chosen[-1:] * (rows - len(chosen))
        ids, mask = _few_lengths(model, [prompts[index] for index in filled])
        tokens = np.asarray(_greedy(model, max_tokens, variables, ids, mask, stop))
        for index, row in zip(chosen, tokens, strict=False):
            ended = np.flatnonzero(np.asarray(stop)[row])
            texts[index] = tokenizer.decode(row[: ended[0] if ended.size else None].tolist())
    return texts


@functools.partial(jax.jit, static_argnums=(0, 1))
def _greedy(
    model: Any, most: int, variables: Any, ids: jax.Array, mask: jax.Array, stop: jax.Array
) -> jax.Array:
    """Return (rows, most) tokens; those after an end token have no meaning."""
    apply = lora_apply(model.apply)
    encoded = apply(variables, ids, mask, method="encode")
    dtype = encoded.dtype
    cache = model.init_cache(ids.shape[0], most, dtype)
    decode = lambda token, cache: apply(  # noqa: E731
        variables, token, encoded, mask, cache=cache, method="decode"
    )
    logits, cache = decode(model.first_tokens(ids.shape[0]), cache)

    def choose(logits: jax.Array) -> jax.Array:  # (rows, 1, vocabulary) -> (rows,)
        return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        index, token, done, cache, tokens = state
        logits, cache = decode(token[:, None], cache)
        token = choose(logits)
        tokens = tokens.at[:, index].set(token)
        return index + 1, token, done | stop[token], cache, tokens

    token = choose(logits)
    tokens = jnp.zeros((ids.shape[0], most), jnp.int32).at[:, 0].set(token)
    state = (jnp.int32(1), token, stop[token], cache, tokens)
    running = lambda state: (state[0] < most) & ~state[2].all()  # noqa: E731
    return jax.lax.while_loop(running, step, state)[-1]


def _few_lengths(model: Any, sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pad sequences on the right to one of a few lengths: (rows, length) ids and mask."""
    length = -(-max(map(len, sequences)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    length = min(length, longest_input(model))
    return pad_sequences(sequences, len(sequences), length, model.config.pad_token_id or 0)


def _with_lines(batches: Batches) -> Iterator[tuple[Any, list[int]]]:
    """Go through the batches once, with the lines of their examples."""
    size = batches.rows
    parts = (
        rows[start : start + size]
        for _, rows in batches.buckets
        for start in range(0, len(rows), size)
    )
    for batch, part in zip(batches.once(), parts, strict=True):
        yield batch, [batches.examples[index].line for row in part for index in row]
