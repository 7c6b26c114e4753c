"""Choose what layers keep for the backward pass: the fastest choice that fits into memory."""

from __future__ import annotations

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.compiled_step import step_memory
from jax_lora.plan.planned_model import PlannedModel


def fit_remat(
    model: PlannedModel, settings: TrainSettings, memory: float, *, length: int, targets: int
) -> str:
    """Return `"names"` if the compiled step fits into the memory of a device, else `"full"`.

    The compiled step is the one that training runs, so the compilation cache keeps it.

    Args:
      model: The model.
      settings: Settings of the run.
      memory: Bytes of one device.
      length: Longest sequence of a batch.
      targets: Most target tokens of an example.

    Returns:
      The choice.
    """
    step = step_memory(model, settings, length=length, targets=targets, remat="names")
    return "names" if step is None or step.peak <= memory else "full"
