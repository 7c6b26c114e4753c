"""Where the batches of a training run come from: a sequence, a function of the step, or a stream.

A resumed run must see the batches that it would have seen without the interruption. A sequence and
a function return the batch of any step at once. A stream is read from its start up to that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jax_lora.errors import DataError, StructureError, format_error

AHEAD = 2  # batches that are made before they are asked for


class Tokens(NamedTuple):
    """Tokens of a step: of the texts themselves, with template and end tokens, with padding."""

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
    """Wrap what a user passes as batches.

    Args:
      batches: A sequence (an epoch, repeated), a function of the step, an iterable (read again from
        its start when it ends), or a `BatchSource`.

    Returns:
      The source.

    Raises:
      StructureError: Anything else, or an empty sequence.
    """
    if hasattr(batches, "at") and hasattr(batches, "per_epoch"):
        return batches
    if isinstance(batches, Sequence) and len(batches) > 0:
        return _Epoch(batches)
    if callable(batches):
        return _Function(batches)
    if isinstance(batches, Iterable) and not isinstance(batches, Sequence):
        return _Stream(batches)
    raise StructureError(
        format_error(
            "batches",
            got=f"an empty {type(batches).__name__}"
            if isinstance(batches, Sequence)
            else f"a {type(batches).__name__}",
            expected="a sequence of batches, a function from a step to a batch, or an iterable",
            fix="Pass a list of batches, or lambda step: batch.",
        )
    )


def all_batches(batches: Any) -> Iterable[Any]:
    """Return the batches of a validation set, each once and in order.

    Args:
      batches: A sequence or another iterable of batches, or `jax_lora.data.batches.Batches`.

    Returns:
      An iterable to go through once.

    Raises:
      StructureError: An iterator, which would be empty at the second validation.
    """
    if hasattr(batches, "once"):
        return batches.once()
    if isinstance(batches, Iterable) and not isinstance(batches, Iterator):
        return batches
    raise StructureError(
        format_error(
            "validation batches",
            got=f"a {type(batches).__name__}",
            expected="a sequence, or an iterable that starts anew every time",
            fix="Pass list(batches).",
        )
    )


def unit_of(source: BatchSource) -> str:
    """Return what the counts of `tokens_of` are: "Tokens", or "Targets"."""
    return "Tokens" if hasattr(source, "raw_tokens") else "Targets"


def tokens_of(source: BatchSource, step: int, batch: Any, weight: float) -> Tokens:
    """Count the tokens of a step; for batches without tokens, their weight stands for them."""
    if hasattr(source, "raw_tokens"):
        known: Any = source
        return Tokens(known.raw_tokens(step), known.tokens(step), int(batch.ids.size))
    return Tokens(int(weight), int(weight), int(weight))


def load_ahead(source: BatchSource, start: int, stop: int) -> Iterator[Any]:
    """Go through the batches of some steps, each made while the step before it runs.

    Args:
      source: The batches.
      start: The first step.
      stop: The step after the last one.

    Returns:
      The batches in order.
    """
    try:
        import grain
    except ImportError:  # an optional package: without it, batches are made when asked for
        return (source.at(step) for step in range(start, stop))
    # One thread: streams are read in order, and an epoch's order is drawn once.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    steps: Any = _Steps(source, start, stop)
    return iter(grain.MapDataset.source(steps).to_iter_dataset(options))


class _Steps:
    """The batches of some steps as what grain reads from."""

    def __init__(self, source: BatchSource, start: int, stop: int):
        self._source, self._start, self._stop = source, start, stop

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __getitem__(self, index: int) -> Any:
        return self._source.at(self._start + index)


class _Plain:
    """A source of batches about which nothing more is known."""

    per_epoch: int | None = None

    def describe(self, step: int) -> str:
        return f"batch {step}"

    def describe_shape(self, batch: Any) -> str:
        shapes = [str(jnp.shape(leaf)) for leaf in jax.tree.leaves(batch)[:4]]
        return f"batches of {', '.join(shapes)}"


class _Epoch(_Plain):
    """A sequence of batches, repeated."""

    def __init__(self, batches: Sequence[Any]):
        self._batches, self.per_epoch = batches, len(batches)

    def at(self, step: int) -> Any:
        return self._batches[step % len(self._batches)]


class _Function(_Plain):
    """A function of the step."""

    def __init__(self, function: Callable[[int], Any]):
        self.at = function


class _Stream(_Plain):
    """An iterable, read in order; at its end it is started anew."""

    def __init__(self, batches: Iterable[Any]):
        self._batches, self._iterator, self._next = batches, iter(batches), 0

    def at(self, step: int) -> Any:
        if step < self._next:
            self._iterator, self._next = iter(self._batches), 0
        while self._next < step:  # a resumed run skips what it has seen
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
            format_error(
                "batches",
                got=f"an iterable that ended after {self._next - 1} batches",
                expected="as many batches as the run has steps, or an iterable that starts anew",
                fix="Pass fewer steps, a list, or a function from a step to a batch.",
            )
        )
