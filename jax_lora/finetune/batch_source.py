"""Batches of a training run from a sequence, a function of the step, or a stream.

A resumed run gets the same batches as an uninterrupted run. A sequence and a function have random
access to the batch of a step. A stream is read from its start up to that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.errors import DataError, StructureError

AHEAD = 2  # batches to prefetch


class Tokens(NamedTuple):
    """Token counts of a step: of the texts, with template and end tokens, and with padding."""

    raw: int
    real: int
    padded: int


class BatchSource(Protocol):
    """The batches of a run, by step. `jax_lora.data.batches.Batches` is one."""

    @property
    def per_epoch(self) -> int | None:
        """Number of batches of an epoch; None if unknown."""

    def at(self, step: int, /) -> Any:
        """Return the batch of a step, counted from 0."""

    def describe(self, step: int) -> str:
        """Describe the examples of a step, for messages."""
        ...

    def describe_shape(self, batch: Any) -> str:
        """Describe the shape of a batch, for messages."""
        ...


def as_source(batches: Any) -> BatchSource:
    """Convert batches to a `BatchSource`.

    Args:
      batches: A sequence (one epoch, repeated), a function of the step, an iterable (restarted at
        its end), or a `BatchSource`.

    Raises:
      StructureError: The batches are of another type, or an empty sequence.
    """
    if hasattr(batches, "at") and hasattr(batches, "per_epoch"):
        return batches
    if isinstance(batches, Sequence) and len(batches) > 0:
        return _Plain(lambda step: batches[step % len(batches)], len(batches))
    if callable(batches):
        return _Plain(batches)
    if isinstance(batches, Iterable) and not isinstance(batches, Sequence):
        return _Plain(_Stream(batches))
    raise StructureError(
        "batches",
        got=f"an empty {type(batches).__name__}"
        if isinstance(batches, Sequence)
        else f"a {type(batches).__name__}",
        expected="a sequence of batches, a function from a step to a batch, or an iterable",
        fix="Pass a list of batches, or lambda step: batch.",
    )


def all_batches(batches: Any) -> Iterable[Any]:
    """Return an iterable for one pass over the batches of a validation set.

    Args:
      batches: A sequence or another iterable of batches, or `jax_lora.data.batches.Batches`.

    Raises:
      StructureError: The batches are an iterator, which would be empty at the second validation.
    """
    if hasattr(batches, "once"):
        return batches.once()
    if isinstance(batches, Iterable) and not isinstance(batches, Iterator):
        return batches
    raise StructureError(
        "validation batches",
        got=f"a {type(batches).__name__}",
        expected="a sequence, or an iterable that can be read again",
        fix="Pass list(batches).",
    )


def unit_of(source: BatchSource) -> str:
    """Return the unit of `tokens_of`: "Tokens", or "Targets"."""
    return "Tokens" if hasattr(source, "raw_tokens") else "Targets"


def tokens_of(source: BatchSource, step: int, batch: Any, weight: float) -> Tokens:
    """Count the tokens of a step; for batches without tokens, return their weight."""
    if hasattr(source, "raw_tokens"):
        counted: Any = source
        return Tokens(counted.raw_tokens(step), counted.tokens(step), int(batch.ids.size))
    return Tokens(int(weight), int(weight), int(weight))


def load_ahead(source: BatchSource | RowShare, start: int, stop: int) -> Iterator[Any]:
    """Iterate over the batches of steps `start` to `stop - 1`, prefetched in the background."""
    grain = import_grain()
    if grain is None:  # an optional package; without it, nothing is prefetched
        return (source.at(step) for step in range(start, stop))
    # One thread, because streams are read in order.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    steps: Any = _Steps(source, start, stop)
    return iter(grain.MapDataset.source(steps).to_iter_dataset(options))


def import_grain() -> Any:
    """Import the optional package grain; without it, return None, and nothing is prefetched."""
    try:
        import grain
    except ImportError:
        return None
    return grain


class _Steps:
    """The batches of a range of steps, as a random-access source for grain."""

    def __init__(self, source: BatchSource | RowShare, start: int, stop: int):
        self._source, self._start, self._stop = source, start, stop

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __getitem__(self, index: int) -> Any:
        return self._source.at(self._start + index)


class RowShare:
    """The rows of one process, of the batches of another source.

    Args:
      source: The batches of all processes.
      choose: Returns the indices of the rows for a number of rows; None means all of them.
    """

    def __init__(self, source: BatchSource, choose: Callable[[int], Any]):
        """Keep the source."""
        self._source, self._choose = source, choose

    def at(self, step: int) -> Any:
        """Return this process's rows of the batch of a step."""
        if hasattr(self._source, "rows_at"):  # which does not create the other rows
            counted: Any = self._source
            return counted.rows_at(step, self._choose(counted.rows))
        return take_rows(self._source.at(step), self._choose)


def take_rows(batch: Any, choose: Callable[[int], Any]) -> Any:
    """Return rows of a batch: those of `RowShare`."""
    own = choose(len(jax.tree.leaves(batch)[0]))
    return batch if own is None else jax.tree.map(lambda x: np.asarray(x)[own], batch)


class _Plain:
    """A function of the step, without information about its batches."""

    def __init__(self, at: Callable[[int], Any], per_epoch: int | None = None):
        self.at, self.per_epoch = at, per_epoch

    def describe(self, step: int) -> str:
        return f"batch {step}"

    def describe_shape(self, batch: Any) -> str:
        shapes = [str(jnp.shape(leaf)) for leaf in jax.tree.leaves(batch)[:4]]
        return f"batches of {', '.join(shapes)}"


class _Stream:
    """An iterable as a function of the step; it is read in order and restarted at its end."""

    def __init__(self, batches: Iterable[Any]):
        self._batches, self._iterator, self._next = batches, iter(batches), 0

    def __call__(self, step: int) -> Any:
        if step < self._next:
            self._iterator, self._next = iter(self._batches), 0
        while self._next < step:  # a resumed run skips earlier batches
            self._advance()
        return self._advance()

    def _advance(self) -> Any:
        self._next += 1
        for _ in range(2):
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = iter(self._batches)
        raise DataError(
            "batches",
            got=f"an iterable that ended after {self._next - 1} batches",
            expected="a batch for each step, or an iterable that can be read again",
            fix="Pass fewer steps, a list, or a function from a step to a batch.",
        )
