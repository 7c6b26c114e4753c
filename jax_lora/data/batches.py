"""Batches of few fixed shapes, whose content is a function of (seed, step) and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jax_lora.data.examples import Example
from jax_lora.data.packing import pack_rows

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


Documents = tuple[int, ...]  # indices of the examples of a row: one, or several packed ones
Plan = list[tuple[Bucket, Sequence[Documents]]]  # the batches of an epoch


@dataclasses.dataclass(frozen=True)
class Batches:
    """All batches of a data set, by step.

    Args:
      examples: The rows' contents.
      rows: Rows in a batch.
      seed: Chooses the order, which is another one in every epoch.
      buckets: The shapes, from short to long, each with the rows that it takes.
      packed: Whether rows hold several documents.
    """

    examples: tuple[Example, ...]
    rows: int
    seed: int
    buckets: tuple[tuple[Bucket, tuple[Documents, ...]], ...]
    packed: bool = False

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
          pack: Length of packed rows, at least that of the longest example; None does not pack.

        Returns:
          The batches.
        """
        if pack is not None:
            shape, packed = _packed(examples, pack)
            return cls(tuple(examples), rows, seed, ((shape, packed),), packed=True)
        shapes = choose_buckets(examples, buckets)
        members: list[list[Documents]] = [[] for _ in shapes]
        for index, example in enumerate(examples):
            fits = (place for place, b in enumerate(shapes) if len(example.ids) <= b.length)
            members[next(fits)].append((index,))
        sorted_in = tuple((shape, tuple(of)) for shape, of in zip(shapes, members, strict=True))
        return cls(tuple(examples), rows, seed, sorted_in)

    @property
    def per_epoch(self) -> int:
        """Count the batches that show every row once."""
        return sum(-(-len(members) // self.rows) for _, members in self.buckets)

    @property
    def padding(self) -> float:
        """The share of an epoch's tokens that is padding, missing rows left aside."""
        whole = sum(shape.length * len(members) for shape, members in self.buckets)
        return 1.0 - sum(len(example.ids) for example in self.examples) / whole

    def at(self, step: int) -> Batch:
        """Make the batch of a step, counted from 0.

        Args:
          step: Any step; the epochs follow one another.

        Returns:
          The batch.
        """
        return self.pad(*self._planned(step))

    def tokens(self, step: int) -> int:
        """Count the real tokens of a step: prompts and answers, no padding."""
        return sum(len(example.ids) for example in self._of(step))

    def raw_tokens(self, step: int) -> int:
        """Count the tokens of a step's own text: no template, no start and end tokens."""
        return sum(example.raw for example in self._of(step))

    def lines(self, step: int) -> list[int]:
        """Name the lines of a step's rows, for messages."""
        return [example.line for example in self._of(step)]

    def once(self) -> Iterator[Batch]:
        """Go through every row once, in the file's own order: for validation and tests."""
        for shape, members in self.buckets:
            for start in range(0, len(members), self.rows):
                yield self.pad(shape, members[start : start + self.rows])

    def _of(self, step: int) -> list[Example]:
        return [self.examples[index] for row in self._planned(step)[1] for index in row]

    def _planned(self, step: int) -> tuple[Bucket, Sequence[Documents]]:
        epoch, position = divmod(step, self.per_epoch)
        return self._epoch(epoch)[position]

    def _epoch(self, epoch: int) -> Plan:
        """An epoch's order is made once, and not at every step; a loader may be in the next."""
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._plans[epoch] = self._plan(epoch)
            for other in [each for each in self._plans if abs(each - epoch) > 1]:
                self._plans.pop(other, None)
        return plan

    @functools.cached_property
    def _plans(self) -> dict[int, Plan]:
        return {}

    def _plan(self, epoch: int) -> Plan:
        """Shuffle the rows of every shape, cut them into batches, and shuffle those."""
        order = np.random.default_rng((self.seed, epoch))
        plan: Plan = []
        for shape, members in self.buckets:
            shuffled = [members[index] for index in order.permutation(len(members))]
            starts = range(0, len(shuffled), self.rows)
            plan += [(shape, shuffled[start : start + self.rows]) for start in starts]
        return [plan[index] for index in order.permutation(len(plan))]

    def pad(self, shape: Bucket, rows: Sequence[Documents]) -> Batch:
        """Put rows into a shape; rows that are missing are there with weight 0.

        Args:
          shape: The shape.
          rows: The examples of each row, at most as many as a batch has.

        Returns:
          The batch.
        """
        ids = np.zeros((self.rows, shape.length), np.int32)
        at = np.zeros((self.rows, shape.learned), np.int32)
        labels, weights = np.zeros_like(at), np.zeros(at.shape, np.float32)
        positions, segments = np.zeros_like(ids), np.zeros_like(ids)
        for row, documents in enumerate(rows):
            start, count = 0, 0
            for number, index in enumerate(documents, start=1):
                example = self.examples[index]
                here = slice(start, start + len(example.ids))
                ids[row, here] = example.ids
                positions[row, here] = np.arange(len(example.ids))
                segments[row, here] = number
                # From the second token on: a document's first is nobody's to predict.
                (places,) = np.nonzero(example.learned[1:])  # (learned,)
                chosen = slice(count, count + len(places))
                at[row, chosen] = start + places
                labels[row, chosen] = example.ids[places + 1]
                weights[row, chosen] = 1.0
                start, count = here.stop, chosen.stop
        if not self.packed:
            return Batch(ids, at, labels, weights)
        return Batch(ids, at, labels, weights, positions, segments)


def _packed(examples: Sequence[Example], length: int) -> tuple[Bucket, tuple[Documents, ...]]:
    """One shape for all packed rows."""
    longest = max(len(example.ids) for example in examples)
    room = _rounded(max(length, longest))
    packed = pack_rows([len(example.ids) for example in examples], room)
    learned = [sum(int(examples[i].learned[1:].sum()) for i in row) for row in packed]
    shape = Bucket(room, min(room, _rounded(max(learned))))
    return shape, tuple(tuple(row) for row in packed)


def _rounded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


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
    lengths = [_rounded(len(example.ids)) for example in examples]
    sizes, counts = np.unique(lengths, return_counts=True)
    chosen = _least_padding(_merged(sizes.tolist(), counts.tolist()), count)
    buckets, shorter = [], 0
    for length in chosen:
        members = [example for example in examples if shorter < len(example.ids) <= length]
        learned = max(int(example.learned[1:].sum()) for example in members)
        buckets.append(Bucket(length, min(length, _rounded(learned))))
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
