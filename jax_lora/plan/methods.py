"""Estimates of full fine-tuning, LoRA, and LoRA on a quantized base, by formula."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_lora.plan import arithmetic
from jax_lora.plan.arithmetic import ADAPTER_BYTES, KernelShape, ModelShape, Residuals, Step


@dataclasses.dataclass(frozen=True)
class Method:
    """A fine-tuning method applied to a model.

    Args:
      shape: The model.
      adapted: Adapted kernels.
      rank: LoRA rank.
      trainable: Parameters of the adapter.
      itemsize: Bytes of an element of the base weights and activations.
      optimizer: Name of the optimizer.
      full: Whether to train the base weights, without an adapter.
      quantize: `"none"`, `"int8"` or `"nf4"`.
      residuals: Traced activation sizes; None: the formula for Transformers in general.
      on_cpu: Whether the step runs on a CPU, where products of 16-bit arrays need float32 copies.
    """

    shape: ModelShape
    adapted: tuple[KernelShape, ...]
    rank: int
    trainable: int
    itemsize: int
    optimizer: str = "adamw"
    full: bool = False
    quantize: str = "none"
    residuals: Residuals | None = None
    on_cpu: bool = False


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory in bytes and operations of one training step.

    Args:
      trainable: Trainable parameters.
      weights: Memory of the base weights.
      adapter: Memory of the adapter.
      gradients: Memory of the gradients.
      optimizer_state: Memory of the optimizer state.
      activations: Memory of the activations kept for the backward pass.
      logits: Memory of the logits and their gradient.
      copies: Memory of float32 copies of 16-bit weights.
      flops: Floating-point operations.
    """

    trainable: int
    weights: float
    adapter: int
    gradients: int
    optimizer_state: int
    activations: float
    logits: int
    copies: int
    flops: int

    @property
    def total(self) -> float:
        """Peak memory in bytes."""
        between_steps = self.weights + self.adapter + self.optimizer_state
        return between_steps + self.gradients + self.activations + self.logits + self.copies

    def as_dict(self) -> dict[str, Any]:
        """Return the values and their total by name."""
        return dataclasses.asdict(self) | {"total": self.total}


def estimate(method: Method, step: Step) -> Estimate:
    """Estimate the memory and operations of a method with the formulas of `arithmetic`."""
    shape, itemsize = method.shape, method.itemsize
    trainable = shape.size if method.full else method.trainable
    trained_itemsize = itemsize if method.full else ADAPTER_BYTES
    rank = 0 if method.full else method.rank
    if method.full:
        flops = arithmetic.full_flops(shape, step)
    else:
        flops = arithmetic.lora_flops(shape, step, rank, method.adapted)
    return Estimate(
        trainable=trainable,
        weights=arithmetic.weight_bytes(shape, itemsize, method.quantize),
        adapter=0 if method.full else trainable * trained_itemsize,
        # Accumulation keeps the running sum beside the current gradient.
        gradients=trainable * trained_itemsize * (1 if step.accumulation == 1 else 2),
        optimizer_state=arithmetic.optimizer_bytes(trainable, trained_itemsize, method.optimizer),
        activations=arithmetic.activation_bytes(
            shape, step, itemsize, rank, len(method.adapted), method.residuals
        ),
        logits=arithmetic.logit_bytes(shape, step),
        copies=arithmetic.float32_copy_bytes(shape, itemsize) if method.on_cpu else 0,
        flops=flops,
    )


def side_by_side(method: Method, step: Step) -> dict[str, Estimate]:
    """Estimate every method for one step, given LoRA on a base that is not quantized."""
    lora = dataclasses.replace(method, full=False, quantize="none")
    columns = {
        "full": dataclasses.replace(lora, full=True),
        "LoRA": lora,
        "LoRA, int8": dataclasses.replace(lora, quantize="int8"),
        "LoRA, NF4": dataclasses.replace(lora, quantize="nf4"),
    }
    return {name: estimate(each, step) for name, each in columns.items()}
