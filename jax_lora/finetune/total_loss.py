"""The loss of many batches: their sums added up, so that every learned token counts the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax_lora.data.batches import Batch, Batches


def total_loss(
    measure: Callable[..., Any],
    trained: Any,
    frozen: Any,
    batches: Batches,
    most: int = -1,
    *,
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> tuple[float, float]:
    """Add up the losses of the learned tokens.

    Args:
      measure: From `make_validation`.
      trained: The adapter, or None for the base.
      frozen: The base.
      batches: The rows.
      most: How many batches; -1 for all.
      place: Puts a batch on the devices.

    Returns:
      The sum of the losses, and how many tokens have been learned.
    """
    total = tokens = 0.0
    for number, batch in enumerate(batches.once()):
        if number == most:
            break
        loss, learned = measure(trained, frozen, place(batch))
        total, tokens = total + float(loss), tokens + float(learned)
    return total, tokens
