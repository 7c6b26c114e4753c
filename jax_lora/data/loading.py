"""Batches made ahead of their steps, in the background; where the loader stands can be saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax_lora.data.batches import Batch, Batches

AHEAD = 2  # batches that are ready before they are asked for


class _BySteps:
    """Batches as what grain reads from: an item by its number, and as many as there are steps."""

    def __init__(self, batches: Batches, start: int, stop: int):
        self._batches, self._start, self._stop = batches, start, stop

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __getitem__(self, index: int) -> Batch:
        return self._batches.at(self._start + index)


def load_ahead(batches: Batches, start: int, stop: int) -> Iterator[Batch]:
    """Go through the batches of some steps, each made while the one before is being learned.

    What a step gets is a function of the seed and the step alone, so that a loader which starts in
    the middle goes on as one that came from the beginning.

    Args:
      batches: All batches.
      start: The first step.
      stop: The one behind the last.

    Returns:
      The batches in order.
    """
    import grain

    # One thread: an epoch's order is made once, by whoever asks first.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    source: Any = _BySteps(batches, start, stop)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
