"""Collators, one per task: they turn examples into the padded arrays of a batch.

A collator is called with the examples of each row, the number of rows, the bucket, and a random
generator that depends on the seed and the step alone. Rows without an example have weight 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Bucket(NamedTuple):
    """A shape: sequences of up to `length` tokens with up to `targets` targets."""

    length: int
    targets: int


class Batch(NamedTuple):
    """A causal batch, padded on the right, where no real token attends to padding.

    Attributes:
      ids: (rows, length) int32. Padding is 0, and no result depends on it.
      at: (rows, targets) int32, the positions whose next token is a target.
      labels: (rows, targets) int32, those next tokens.
      weights: (rows, targets) float32, 1 or, where a row has fewer targets, 0.
      positions: (rows, length) int32, which restart at 0 in every example of a packed row; else
        None.
      segments: (rows, length) int32, the number of the example in a packed row, and 0 in padding;
        else None.
    """

    ids: np.ndarray
    at: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    positions: np.ndarray | None = None
    segments: np.ndarray | None = None


class ClassificationBatch(NamedTuple):
    """Texts, or pairs of texts, with their classes.

    Attributes:
      ids: (rows, length) int32.
      mask: (rows, length) int32, 1 at real tokens.
      types: (rows, length) int32, 0 in the first text and 1 in the second.
      labels: (rows,) int32.
      weights: (rows,) float32, 0 in rows without an example.
    """

    ids: np.ndarray
    mask: np.ndarray
    types: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class MaskedBatch(NamedTuple):
    """Texts in which some tokens are masked.

    Attributes:
      ids: (rows, length) int32, after masking.
      mask, types: As in `ClassificationBatch`.
      at: (rows, targets) int32, positions of the masked tokens.
      labels: (rows, targets) int32, the original tokens.
      weights: (rows, targets) float32.
    """

    ids: np.ndarray
    mask: np.ndarray
    types: np.ndarray
    at: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class Seq2SeqBatch(NamedTuple):
    """Prompts for the encoder and completions for the decoder.

    Attributes:
      ids: (rows, length) int32, the prompts.
      mask: (rows, length) int32, 1 at their real tokens.
      decoder_ids: (rows, targets) int32: the start token, then the completion without its last
        token.
      labels: (rows, targets) int32, the completion.
      weights: (rows, targets) float32.
    """

    ids: np.ndarray
    mask: np.ndarray
    decoder_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


Rows = Sequence[Sequence[Any]]  # the examples of each row
Rng = np.random.Generator
Collator = Callable[[Rows, int, Bucket, Rng], Any]


def collate_causal(examples: Rows, rows: int, shape: Bucket, rng: Rng) -> Batch:
    """Make a batch with one example per row."""
    return collate_packed(examples, rows, shape, rng)._replace(positions=None, segments=None)


def collate_packed(examples: Rows, rows: int, shape: Bucket, rng: Rng) -> Batch:
    """Make a batch with several examples per row; none attends to another."""
    ids = np.zeros((rows, shape.length), np.int32)
    at = np.zeros((rows, shape.targets), np.int32)
    labels, weights = np.zeros_like(at), np.zeros(at.shape, np.float32)
    positions, segments = np.zeros_like(ids), np.zeros_like(ids)
    for row, documents in enumerate(examples):
        start, count = 0, 0
        for number, example in enumerate(documents, start=1):
            here = slice(start, start + len(example.ids))
            ids[row, here] = example.ids
            positions[row, here] = np.arange(len(example.ids))
            segments[row, here] = number
            # The first token of an example is never a target.
            (places,) = np.nonzero(example.loss_mask[1:])  # (targets,)
            chosen = slice(count, count + len(places))
            at[row, chosen] = start + places
            labels[row, chosen] = example.ids[places + 1]
            weights[row, chosen] = 1.0
            start, count = here.stop, chosen.stop
    return Batch(ids, at, labels, weights, positions, segments)


@dataclasses.dataclass(frozen=True)
class ClassificationCollator:
    """Pads texts and collects their classes.

    Args:
      pad_id: The padding token.
      types: Number of token types of the model.
    """

    pad_id: int = 0
    types: int = 2

    def __call__(self, examples: Rows, rows: int, shape: Bucket, rng: Rng) -> ClassificationBatch:
        """Make a batch."""
        ids, mask, types = _texts(examples, rows, shape, self)
        labels, weights = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        for row, (example,) in enumerate(examples):
            labels[row], weights[row] = max(example.label, 0), 1.0
        return ClassificationBatch(ids, mask, types, labels, weights)


@dataclasses.dataclass(frozen=True)
class MaskedCollator:
    """Masks tokens: 80% become the mask token, 10% a random token, 10% stay.

    Args:
      mask_id: The mask token.
      vocabulary: Size of the vocabulary, for random tokens.
      pad_id: The padding token.
      types: Number of token types of the model.

    Reference:
      Devlin et al., BERT (arXiv:1810.04805), section 3.1.
    """

    mask_id: int
    vocabulary: int
    pad_id: int = 0
    types: int = 2

    def __call__(self, examples: Rows, rows: int, shape: Bucket, rng: Rng) -> MaskedBatch:
        """Make a batch; the masked tokens differ from step to step."""
        ids, mask, types = _texts(examples, rows, shape, self)
        at = np.zeros((rows, shape.targets), np.int32)
        labels, weights = np.zeros_like(at), np.zeros(at.shape, np.float32)
        for row, (example,) in enumerate(examples):
            (usable,) = np.nonzero(~example.special)
            places = np.sort(rng.choice(usable, example.targets, replace=False))
            count = slice(0, len(places))
            at[row, count], labels[row, count], weights[row, count] = places, ids[row, places], 1.0
            draw = rng.random(len(places))
            ids[row, places[draw < 0.8]] = self.mask_id
            replaced = places[draw >= 0.9]
            ids[row, replaced] = rng.integers(self.vocabulary, size=len(replaced))
        return MaskedBatch(ids, mask, types, at, labels, weights)


@dataclasses.dataclass(frozen=True)
class Seq2SeqCollator:
    """Pads prompts and completions.

    Args:
      start_id: The token that the decoder starts with.
      pad_id: The padding token.
    """

    start_id: int = 0
    pad_id: int = 0

    def __call__(self, examples: Rows, rows: int, shape: Bucket, rng: Rng) -> Seq2SeqBatch:
        """Make a batch."""
        prompts = [each.ids for (each,) in examples]
        ids, mask = pad_sequences(prompts, rows, shape.length, self.pad_id)
        completions = [each.completion for (each,) in examples]
        labels, real = pad_sequences(completions, rows, shape.targets, self.pad_id)
        real[len(examples) :] = 0
        decoder_ids = np.full_like(labels, self.start_id)
        decoder_ids[:, 1:] = labels[:, :-1]
        return Seq2SeqBatch(ids, mask, decoder_ids, labels, real.astype(np.float32))


def _texts(
    examples: Rows, rows: int, shape: Bucket, collator: ClassificationCollator | MaskedCollator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad texts: their ids, masks and token types, without types that the model does not have."""
    texts = [each for (each,) in examples]
    ids, mask = pad_sequences([each.ids for each in texts], rows, shape.length, collator.pad_id)
    types, _ = pad_sequences([each.types for each in texts], rows, shape.length, 0)
    return ids, mask, np.minimum(types, collator.types - 1)


def pad_sequences(
    sequences: Sequence[np.ndarray], rows: int, length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pad sequences on the right: (rows, length) ids and mask.

    Args:
      sequences: (tokens,) int32 each.
      rows: Number of rows; those without a sequence get one unmasked token.
      length: Length of a row.
      pad_id: The padding token.

    Returns:
      The ids, and 1 at real tokens.
    """
    ids = np.full((rows, length), pad_id, np.int32)
    mask = np.zeros((rows, length), np.int32)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    mask[len(sequences) :, 0] = 1  # attention over padding alone would be NaN
    return ids, mask
