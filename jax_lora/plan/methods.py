"""Full fine-tuning, LoRA, and LoRA on a quantized base, side by side and by formula."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_lora.plan import arithmetic
from jax_lora.plan.arithmetic import FACTOR_BYTES, Kept, KernelShape, ModelShape, Work


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train: what it trains, and how the base is kept.

    Args:
      shape: The model.
      adapted: The kernels that get factors.
      rank: Rank of the factors.
      trained: Numbers of the adapter.
      number: Bytes of a number of the base and of the activations.
      optimizer: Its name.
      full: Whether the base itself is trained, and no adapter.
      quantize: `"none"`, `"int8"` or `"nf4"`.
      kept: What a trace says of the activations; None: the formula for Transformers at large.
    """

    shape: ModelShape
    adapted: tuple[KernelShape, ...]
    rank: int
    trained: int
    number: int
    optimizer: str = "adamw"
    full: bool = False
    quantize: str = "none"
    kept: Kept | None = None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a method takes: bytes, and the operations of a step.

    Args:
      trained: Numbers that are trained.
      weights: The base.
      adapter: The factors.
      gradients: Of what is trained.
      moments: The optimizer's state.
      activations: Kept for the backward pass.
      logits: Of the learned tokens, with their gradient.
      flops: Operations of a step.
    """

    trained: int
    weights: float
    adapter: int
    gradients: int
    moments: int
    activations: float
    logits: int
    flops: int

    @property
    def stays(self) -> float:
        """Bytes that are there from step to step."""
        return self.weights + self.adapter + self.moments

    @property
    def passes(self) -> float:
        """Bytes that are there within a step only."""
        return self.gradients + self.activations + self.logits

    @property
    def total(self) -> float:
        """All bytes."""
        return self.stays + self.passes

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers by name, the total among them."""
        return dataclasses.asdict(self) | {"total": self.total}


def estimate(method: Method, work: Work) -> Estimate:
    """Count what a method takes, by the formulas of `arithmetic`.

    Args:
      method: The method.
      work: A step.

    Returns:
      The estimate.
    """
    shape, number = method.shape, method.number
    trained = shape.size if method.full else method.trained
    each = number if method.full else FACTOR_BYTES
    rank = 0 if method.full else method.rank
    if method.full:
        flops = arithmetic.full_flops(shape, work)
    else:
        flops = arithmetic.lora_flops(shape, work, rank, method.adapted)
    return Estimate(
        trained=trained,
        weights=arithmetic.weight_bytes(shape, number, method.quantize),
        adapter=0 if method.full else trained * each,
        # The sum over the parts of a batch, and the gradient of one part.
        gradients=trained * each * (1 if work.parts == 1 else 2),
        moments=arithmetic.moment_bytes(trained, each, method.optimizer),
        activations=arithmetic.activation_bytes(
            shape, work, number, rank, len(method.adapted), method.kept
        ),
        logits=arithmetic.logit_bytes(shape, work),
        flops=flops,
    )


def side_by_side(method: Method, work: Work) -> dict[str, Estimate]:
    """Estimate every method on the same step.

    Args:
      method: LoRA on the base as it is.
      work: A step.

    Returns:
      Estimates by the names of the columns.
    """
    lora = dataclasses.replace(method, full=False)
    columns = {
        "full": dataclasses.replace(lora, full=True),
        "LoRA": lora,
        "LoRA, int8": dataclasses.replace(lora, quantize="int8"),
        "LoRA, NF4": dataclasses.replace(lora, quantize="nf4"),
    }
    return {name: estimate(each, work) for name, each in columns.items()}
