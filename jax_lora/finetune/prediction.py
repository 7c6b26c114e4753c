"""Predictions of models with an encoder: classes, masked tokens, and completions."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.data.batches import Batches
from jax_lora.data.collators import pad_sequences
from jax_lora.data.encoder_tokenizer import EncodedText, EncoderTokenizer
from jax_lora.finetune.generation import filled_batches
from jax_lora.finetune.tasks import end_tokens, longest_input
from jax_lora.models.decoding import end_mask
from jax_lora.transform import lora_apply
from jax_lora.transform.low_memory_jit import low_memory_jit

# Texts are padded to a multiple, which limits recompilation.
LENGTH_MULTIPLE = 16


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
    """Classify the examples of batches from `make_batches`, in the order of their file."""
    predictions = []
    for batch, lines in _with_lines(batches):
        found = np.asarray(_probabilities(model, variables, batch))
        for line, row in zip(lines, found, strict=False):  # then empty rows that fill the batch
            predictions.append(Prediction(line, int(row.argmax()), row))
    return sorted(predictions, key=lambda each: each.line)


@functools.partial(low_memory_jit, static_argnums=0)
def _probabilities(model: Any, variables: Any, batch: Any) -> jax.Array:
    logits = lora_apply(model.apply)(variables, batch.ids, batch.mask, batch.types)
    return jax.nn.softmax(logits.astype(jnp.float32))


def masked_accuracy(model: Any, variables: Any, batches: Batches) -> float:
    """Return the fraction of masked tokens that the model predicts correctly."""
    correct = weight = 0.0
    for batch in batches.once():
        hits, count = _masked_hits(model, variables, batch)
        correct, weight = correct + float(hits), weight + float(count)
    return correct / max(weight, 1.0)


@functools.partial(low_memory_jit, static_argnums=0)
def _masked_hits(model: Any, variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    logits = lora_apply(model.apply)(variables, batch.ids, batch.mask, batch.types)
    chosen = jnp.take_along_axis(logits, batch.at[:, :, None], axis=1)  # (rows, targets, vocab)
    hits = (jnp.argmax(chosen, axis=-1) == batch.labels) * batch.weights
    return hits.sum(), batch.weights.sum()


class Candidate(NamedTuple):
    """A candidate for a mask token: its text, and its probability."""

    text: str
    probability: float


def fill_masks(
    model: Any,
    variables: Any,
    tokenizer: EncoderTokenizer,
    texts: Sequence[EncodedText],
    *,
    top: int = 5,
    rows: int = 16,
) -> list[list[list[Candidate]]]:
    """Find the `top` most probable tokens for every mask token, in batches of `rows` texts.

    Returns:
      For each text its mask tokens, and for each of them the candidates, most probable first.
    """
    config = model.config
    top = min(top, config.vocab_size)
    fills: list[list[list[Candidate]]] = [[] for _ in texts]
    for chosen, filled in filled_batches([len(text.ids) for text in texts], min(rows, len(texts))):
        ids, mask = _few_lengths(model, [texts[index].ids for index in filled])
        rows, length = ids.shape
        types, _ = pad_sequences([texts[index].types for index in filled], rows, length, 0)
        types = np.minimum(types, config.type_vocab_size - 1)
        masked = ids == tokenizer.mask_id
        at = _positions(masked)  # (rows, masks)
        best_tokens = _best_tokens(model, top, variables, ids, mask, types, at)
        probabilities, tokens = (array.tolist() for array in best_tokens)
        for row, index in enumerate(chosen):
            fills[index] = [
                [
                    Candidate(tokenizer.decode([token]), probability)
                    for token, probability in zip(*best, strict=True)
                ]
                for best in zip(tokens[row], probabilities[row], strict=True)
            ][: masked[row].sum()]
    return fills


def _positions(masked: np.ndarray) -> np.ndarray:
    """Return the positions of True in each row, padded with 0 to a power of two."""
    most = int(masked.sum(axis=1).max())
    at = np.zeros((len(masked), 1 << max(most - 1, 0).bit_length()), np.int32)
    for row, places in enumerate(map(np.flatnonzero, masked)):
        at[row, : len(places)] = places
    return at


@functools.partial(low_memory_jit, static_argnums=(0, 1))
def _best_tokens(
    model: Any, top: int, variables: Any, ids: Any, mask: Any, types: Any, at: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the probabilities and the ids of the best tokens: (rows, masks, top) each."""
    apply = lora_apply(model.apply)
    hidden = apply(variables, ids, mask, types, return_hidden=True)
    chosen = jnp.take_along_axis(hidden, at[:, :, None], axis=1)  # (rows, masks, hidden)
    logits = apply(variables, chosen, method="unembed")
    return jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), top)


def complete(
    model: Any,
    variables: Any,
    tokenizer: EncoderTokenizer,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int = 64,
    rows: int = 16,
) -> list[str]:
    """Complete prompts, (tokens,) int32 each, with an encoder-decoder and greedy decoding."""
    stop = jnp.asarray(end_mask(model, end_tokens(model)))
    texts = [""] * len(prompts)
    for chosen, filled in filled_batches(list(map(len, prompts)), min(rows, len(prompts))):
        ids, mask = _few_lengths(model, [prompts[index] for index in filled])
        tokens = np.asarray(_greedy(model, max_tokens, variables, ids, mask, stop))
        for index, row in zip(chosen, tokens, strict=False):
            ended = np.flatnonzero(np.asarray(stop)[row])
            texts[index] = tokenizer.decode(row[: ended[0] if ended.size else None].tolist())
    return texts


@functools.partial(low_memory_jit, static_argnums=(0, 1))
def _greedy(
    model: Any, most: int, variables: Any, ids: jax.Array, mask: jax.Array, stop: jax.Array
) -> jax.Array:
    """Return (rows, most) tokens; ignore those after an end token."""
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
    """Pad sequences on the right to a multiple: (rows, length) ids and mask."""
    length = -(-max(map(len, sequences)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    length = min(length, longest_input(model))
    return pad_sequences(sequences, len(sequences), length, model.config.pad_token_id or 0)


def _with_lines(batches: Batches) -> Iterator[tuple[Any, list[int]]]:
    """Yield the batches once, with the lines of their examples."""
    size = batches.rows
    parts = (
        rows[start : start + size]
        for _, rows in batches.buckets
        for start in range(0, len(rows), size)
    )
    for batch, part in zip(batches.once(), parts, strict=True):
        yield batch, [batches.examples[index].line for row in part for index in row]
