"""Estimates of full fine-tuning, LoRA, and LoRA on a quantized base, by formula."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_lora.plan import arithmetic
from jax_lora.plan.arithmetic import ADAPTER_BYTES, KernelShape, ModelShape, Residuals, Step


@dataclasses.dataclass(frozen=True)
class Method:
    """A fine-tuning method applied to a model."""

    shape: ModelShape
    adapted: tuple[KernelShape, ...]
    rank: int
    trainable: int  # parameters of the adapter
    itemsize: int  # bytes of an element of the base weights and activations
    optimizer: str = "adamw"
    full: bool = False  # whether to train the base weights, without an adapter
    quantize: str = "none"  # "none", "int8" or "nf4"
    residuals: Residuals | None = None  # traced; None: the formula for Transformers in general
    on_cpu: bool = False  # there, products of 16-bit arrays need float32 copies


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory in bytes and operations of one training step."""

    trainable: int  # parameters
    weights: float  # of the base model
    adapter: int
    gradients: int
    optimizer_state: int
    activations: float  # kept for the backward pass
    logits: int  # with their gradient
    copies: int  # in float32, of 16-bit weights
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
    """Estimate full fine-tuning, LoRA, and LoRA on quantized bases, for one step."""
    lora = dataclasses.replace(method, full=False, quantize="none")
    columns = {
        "full": dataclasses.replace(lora, full=True),
        "LoRA": lora,
        "LoRA, int8": dataclasses.replace(lora, quantize="int8"),
        "LoRA, NF4": dataclasses.replace(lora, quantize="nf4"),
    }
    return {name: estimate(each, step) for name, each in columns.items()}
