"""The loss on held-out batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from jax_lora.adapter import combine
from jax_lora.finetune.step import Join, LossFn
from jax_lora.transform import lora_apply
from jax_lora.transform.low_memory_jit import low_memory_jit


def make_validation(loss_fn: LossFn, *, join: Join = combine) -> Callable[[Any, Any, Any], Any]:
    """Compile a loss function, as that of `make_step`, for validation.

    Returns:
      `measure(trainable, frozen, batch) -> (sum of losses, weight)`, jitted. If
      `trainable` is None, the loss is that of `frozen`.
    """
    loss = lora_apply(loss_fn)

    @low_memory_jit
    def measure(trainable: Any, frozen: Any, batch: Any) -> Any:
        return loss(frozen if trainable is None else join(frozen, trainable), batch)

    return measure


def total_loss(
    measure: Callable[..., Any],
    trainable: Any,
    frozen: Any,
    batches: Iterable[Any],
    limit: int = -1,
    *,
    place: Callable[[Any], Any] = lambda batch: batch,
) -> tuple[float, float]:
    """Return the sum of the losses of batches, and their weight.

    Args:
      measure: From `make_validation`.
      trainable: The adapter, or None for the base model.
      frozen: The base model's variables.
      batches: The batches.
      limit: Maximum number of batches; -1 for all.
      place: Puts a batch on the devices.
    """
    total = weight = 0.0
    for batch in itertools.islice(batches, None if limit < 0 else limit):
        loss, count = measure(trainable, frozen, place(batch))
        total, weight = total + float(loss), weight + float(count)
    return total, weight
