"""Batches of a few fixed shapes, determined by the seed and the step alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jax_lora.data.collators import (
    Bucket,
    Collator,
    MaskedBatch,
    MaskedCollator,
    collate_causal,
    collate_packed,
)
from jax_lora.data.examples import Example
from jax_lora.data.packing import pack_rows

# Each shape is compiled separately. Fewer shapes mean more padding; with three, about 10%.
BUCKETS = 3
MULTIPLE = 8

Documents = tuple[int, ...]  # indices of the examples in a row; several if packed
Plan = list[tuple[Bucket, Sequence[Documents]]]  # the batches of an epoch


@dataclasses.dataclass(frozen=True)
class Batches:
    """All batches of a data set, by step, in an order that differs from epoch to epoch.

    Args:
      examples, rows, seed, collate: As for `of`.
      buckets: The shapes, from short to long, each with the indices of its examples.
    """

    examples: tuple[Example, ...]
    rows: int
    seed: int
    buckets: tuple[tuple[Bucket, tuple[Documents, ...]], ...]
    collate: Collator = collate_causal

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        rows: int,
        *,
        seed: int = 0,
        buckets: int = BUCKETS,
        pack: int | None = None,
        collate: Collator = collate_causal,
    ) -> Batches:
        """Choose the shapes with the least padding, and assign the examples to them.

        Args:
          examples: The examples.
          rows: Rows per batch.
          seed: Random seed of the order.
          buckets: Maximum number of shapes.
          pack: Length of packed rows in tokens, at least that of the longest example; None: no
            packing.
          collate: Creates the arrays of a batch; not used with `pack`.

        Returns:
          The batches.
        """
        if pack is not None:
            shape, packed = _packed(examples, pack)
            return cls(tuple(examples), rows, seed, ((shape, packed),), collate_packed)
        shapes = choose_buckets(examples, buckets)
        members: list[list[Documents]] = [[] for _ in shapes]
        for index, example in enumerate(examples):
            fits = (place for place, b in enumerate(shapes) if len(example.ids) <= b.length)
            members[next(fits)].append((index,))
        sorted_in = tuple((shape, tuple(of)) for shape, of in zip(shapes, members, strict=True))
        return cls(tuple(examples), rows, seed, sorted_in, collate)

    @property
    def per_epoch(self) -> int:
        """Count the batches of an epoch, in which every example occurs once."""
        return sum(-(-len(members) // self.rows) for _, members in self.buckets)

    @property
    def padding(self) -> float:
        """Return the fraction of padding in an epoch, without empty rows."""
        padded = sum(shape.length * len(members) for shape, members in self.buckets)
        return 1.0 - sum(len(example.ids) for example in self.examples) / padded

    def at(self, step: int) -> Any:
        """Create the batch of a step.

        Args:
          step: The step, counted from 0 over all epochs.

        Returns:
          The batch.
        """
        return self._collated(step, *self._planned(step))

    def rows_at(self, step: int, own: np.ndarray | None) -> Any:
        """Create some rows of the batch of a step.

        Args:
          step: As in `at`.
          own: Indices of the rows, in order; None: all.

        Returns:
          These rows of `at(step)`.
        """
        if own is None:
            return self.at(step)
        if isinstance(self.collate, MaskedCollator):  # each row draws after the rows before it
            return MaskedBatch(*(array[own] for array in self.at(step)))
        shape, members = self._planned(step)
        some = [members[row] for row in own if row < len(members)]
        return self._collated(step, shape, some, rows=len(own))

    def tokens(self, step: int) -> int:
        """Count the tokens of a step, without padding."""
        return sum(example.tokens for example in self._of(step))

    def raw_tokens(self, step: int) -> int:
        """Count the text tokens of a step, without template, BOS and EOS tokens."""
        return sum(example.raw for example in self._of(step))

    def lines(self, step: int) -> list[int]:
        """Return the line numbers of a step's examples, for messages."""
        return [example.line for example in self._of(step)]

    def describe(self, step: int) -> str:
        """Describe a step's examples, for messages."""
        return f"examples at lines {', '.join(map(str, self.lines(step)[:10]))}"

    def describe_shape(self, batch: Any) -> str:
        """Describe a batch's shape, for the message before a compilation."""
        packed = getattr(batch, "segments", None) is not None
        prefix = "packed sequences of" if packed else "sequences of up to"
        return f"{prefix} {batch.ids.shape[1]} tokens"

    def once(self) -> Iterator[Any]:
        """Yield every example once, unshuffled, for validation and tests."""
        step = 0
        for shape, members in self.buckets:
            for start in range(0, len(members), self.rows):
                yield self._collated(step, shape, members[start : start + self.rows])
                step += 1

    def _of(self, step: int) -> list[Example]:
        return [self.examples[index] for row in self._planned(step)[1] for index in row]

    def _planned(self, step: int) -> tuple[Bucket, Sequence[Documents]]:
        epoch, position = divmod(step, self.per_epoch)
        return self._epoch(epoch)[position]

    @functools.cached_property
    def _epoch(self) -> Callable[[int], Plan]:
        """Return the plan of an epoch; cached, because prefetching can be one epoch ahead."""
        return functools.lru_cache(maxsize=2)(self._plan)

    def _plan(self, epoch: int) -> Plan:
        """Shuffle the rows of every shape, split them into batches, and shuffle the batches."""
        order = np.random.default_rng((self.seed, epoch))
        plan: Plan = []
        for shape, members in self.buckets:
            shuffled = [members[index] for index in order.permutation(len(members))]
            starts = range(0, len(shuffled), self.rows)
            plan += [(shape, shuffled[start : start + self.rows]) for start in starts]
        return [plan[index] for index in order.permutation(len(plan))]

    def _collated(
        self, step: int, shape: Bucket, members: Sequence[Documents], rows: int | None = None
    ) -> Any:
        of_rows = [[self.examples[index] for index in row] for row in members]
        rng = np.random.default_rng((self.seed, step, 1))
        return self.collate(of_rows, self.rows if rows is None else rows, shape, rng)


def _packed(examples: Sequence[Example], length: int) -> tuple[Bucket, tuple[Documents, ...]]:
    """Pack all examples into rows of one shape."""
    longest = max(len(example.ids) for example in examples)
    room = _rounded(max(length, longest))
    packed = pack_rows([len(example.ids) for example in examples], room)
    targets = [sum(examples[index].targets for index in row) for row in packed]
    shape = Bucket(room, min(room, _rounded(max(targets))))
    return shape, tuple(tuple(row) for row in packed)


def _rounded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def choose_buckets(examples: Sequence[Example], count: int) -> tuple[Bucket, ...]:
    """Choose at most `count` bucket lengths that minimize padding, from short to long.

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
        targets = max(example.targets for example in members)
        # Rounding must not give a causal example more targets than tokens.
        rounded = _rounded(targets) if targets > length else min(length, _rounded(targets))
        buckets.append(Bucket(length, rounded))
        shorter = length
    return tuple(buckets)


def _merged(sizes: list[int], counts: list[int], most: int = 64) -> list[tuple[int, int]]:
    """Reduce the candidate lengths, so that the search stays fast for long texts."""
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
