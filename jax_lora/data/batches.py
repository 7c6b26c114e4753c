"""Batches of few fixed shapes, whose content is a function of (seed, step) and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jax_lora.data.examples import Example

# Every shape is a program to compile; every shape less is more padding. Three lose about a tenth.
BUCKETS = 3
MULTIPLE = 8


class Batch(NamedTuple):
    """One step's data; rows are padded on the right, where a causal model never looks back from.

    Attributes:
      ids: (rows, length) int32. Padding is 0, and nothing depends on it.
      at: (rows, learned) int32, the positions whose next token is learned.
      labels: (rows, learned) int32, those next tokens.
      weights: (rows, learned) float32, 1 or, where a row has fewer, 0.
      positions: (rows, length) int32, from 0 in every document of a packed row; else None.
      segments: (rows, length) int32, the documents of a packed row; 0 is padding.
    """

    ids: np.ndarray
    at: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    positions: np.ndarray | None = None
    segments: np.ndarray | None = None


class Bucket(NamedTuple):
    """A shape: rows up to `length` tokens, of which up to `learned` are learned."""

    length: int
    learned: int


@dataclasses.dataclass(frozen=True)
class Batches:
    """All batches of a data set, by step.

    Args:
      examples: The rows.
      rows: Rows in a batch.
      seed: Chooses the order, which is another one in every epoch.
      buckets: The shapes, from short to long.
    """

    examples: tuple[Example, ...]
    rows: int
    seed: int
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        rows: int,
        *,
        seed: int = 0,
        buckets: int = BUCKETS,
        pack: int | None = None,
    ) -> Batches:
        """Choose the shapes that pad the least and put the examples into them.

        Args:
          examples: The rows.
          rows: Rows in a batch.
          seed: Chooses the order.
          buckets: How many shapes at most.
          pack: Length of packed rows.

        Returns:
          The batches.
        """
        shapes = choose_buckets(examples, buckets)
        return cls(tuple(examples), rows, seed, shapes)

    @property
    def per_epoch(self) -> int:
        """Count the batches that show every row once."""
        return sum(-(-len(members) // self.rows) for members in self._members)

    def at(self, step: int) -> Batch:
        """Make the batch of a step, counted from 0.

        Args:
          step: Any step; the epochs follow one another.

        Returns:
          The batch.
        """
        return self.pad(*self._plan(step))

    def tokens(self, step: int) -> int:
        """Count the real tokens of a step: prompts and answers, no padding."""
        return sum(len(self.examples[index].ids) for index in self._plan(step)[1])

    def raw_tokens(self, step: int) -> int:
        """Count the tokens of a step's own text: no template, no start and end tokens."""
        return sum(self.examples[index].raw for index in self._plan(step)[1])

    def lines(self, step: int) -> list[int]:
        """Name the lines of a step's rows, for messages."""
        return [self.examples[index].line for index in self._plan(step)[1]]

    def once(self) -> Iterator[Batch]:
        """Go through every row once, in the file's own order: for validation and tests."""
        for bucket, members in zip(self.buckets, self._members, strict=True):
            for start in range(0, len(members), self.rows):
                yield self.pad(bucket, members[start : start + self.rows])

    def _plan(self, step: int) -> tuple[Bucket, list[int]]:
        epoch, position = divmod(step, self.per_epoch)
        order = np.random.default_rng((self.seed, epoch))
        plan = []
        for bucket, members in zip(self.buckets, self._members, strict=True):
            shuffled = order.permutation(np.asarray(members, np.int64)).tolist()
            starts = range(0, len(shuffled), self.rows)
            plan += [(bucket, shuffled[start : start + self.rows]) for start in starts]
        return plan[order.permutation(len(plan))[position]]

    @functools.cached_property
    def _members(self) -> list[list[int]]:
        """Sort the examples' indices into the buckets."""
        members: list[list[int]] = [[] for _ in self.buckets]
        for index, example in enumerate(self.examples):
            fits = (place for place, b in enumerate(self.buckets) if len(example.ids) <= b.length)
            members[next(fits)].append(index)
        return members

    def pad(self, bucket: Bucket, indices: Sequence[int]) -> Batch:
        """Put rows into a bucket's shape; rows that are missing are there with weight 0.

        Args:
          bucket: The shape.
          indices: Which examples, at most `rows` of them.

        Returns:
          The batch.
        """
        ids = np.zeros((self.rows, bucket.length), np.int32)
        at = np.zeros((self.rows, bucket.learned), np.int32)
        labels, weights = np.zeros_like(at), np.zeros(at.shape, np.float32)
        for row, index in enumerate(indices):
            example = self.examples[index]
            ids[row, : len(example.ids)] = example.ids
            (places,) = np.nonzero(example.learned[1:])  # (learned,)
            at[row, : len(places)] = places
            labels[row, : len(places)] = example.ids[places + 1]
            weights[row, : len(places)] = 1.0
        return Batch(ids, at, labels, weights)


def choose_buckets(examples: Sequence[Example], count: int) -> tuple[Bucket, ...]:
    """Choose lengths such that padding every row to the next one adds the fewest tokens.

    Args:
      examples: The rows.
      count: How many lengths at most.

    Returns:
      The shapes, from short to long.

    Example:
      >>> row = lambda n: Example(np.zeros(n, np.int32), np.ones(n, bool), 1)
      >>> [bucket.length for bucket in choose_buckets([row(n) for n in (5, 7, 30, 32)], 2)]
      [8, 32]
    """
    lengths = [-(-len(example.ids) // MULTIPLE) * MULTIPLE for example in examples]
    sizes, counts = np.unique(lengths, return_counts=True)
    chosen = _least_padding(_merged(sizes.tolist(), counts.tolist()), count)
    buckets, shorter = [], 0
    for length in chosen:
        members = [example for example in examples if shorter < len(example.ids) <= length]
        learned = max(int(example.learned[1:].sum()) for example in members)
        buckets.append(Bucket(length, min(length, -(-learned // MULTIPLE) * MULTIPLE)))
        shorter = length
    return tuple(buckets)


def _merged(sizes: list[int], counts: list[int], most: int = 64) -> list[tuple[int, int]]:
    """Thin out the candidate lengths, so that the choice stays quick on long texts."""
    every = -(-len(sizes) // most)
    groups = [range(max(0, end - every), end) for end in range(len(sizes), 0, -every)][::-1]
    return [(sizes[group[-1]], sum(counts[index] for index in group)) for group in groups]


def _least_padding(candidates: list[tuple[int, int]], count: int) -> list[int]:
    """Choose at most `count` of the candidate lengths, the longest among them.

    `best[n]` holds (tokens with padding, chosen lengths) for the n shortest candidates.
    """
    best: list[tuple[int, list[int]]] = [(0, [])] + [(2**62, [])] * len(candidates)
    for _ in range(count):
        grown = list(best)
        for end in range(1, len(candidates) + 1):
            size = candidates[end - 1][0]
            for start in range(end):
                rows = sum(number for _, number in candidates[start:end])
                tokens = best[start][0] + rows * size
                if tokens < grown[end][0]:
                    grown[end] = (tokens, [*best[start][1], size])
        best = grown
    return best[-1][1]
