"""The parts of a rule. table.py has a rule per primitive; interpretations apply them.

A rule depends only on the names of axes wherever possible, so that it serves every interpretation:
`evaluate` has arrays as well, `analyze` has only names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax_lora.algebra.low_rank import Axes
from jax_lora.algebra.moves import Move
from jax_lora.algebra.named_axes import AxisName


@dataclasses.dataclass(frozen=True)
class Operand:
    """The weight among the operands of an equation."""

    eqn: Any
    position: int  # of the weight among the operands
    axes: Axes  # the name of every axis; None for an axis of size 1 that no factor has
    values: Sequence[Any] | None = None  # for steps of a move; None if there are only names

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.eqn.invars[self.position].aval.shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.eqn.outvars[0].aval.shape

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the equation."""
        return self.eqn.params

    def value(self, position: int) -> Any:
        """Return an operand as an array, for the steps of a move."""
        if self.values is None:
            raise ValueError("the operands have names only and no arrays")
        return self.values[position]


@dataclasses.dataclass(frozen=True)
class Use:
    """A contraction, lookup or convolution of a weight with data."""

    kind: str  # "dense", "embedding" or "conv"
    summed: Axes  # names of the weight's summed or looked-up axes
    batched: Axes  # names of the weight's batch axes
    data: int  # position of the data among the operands
    data_axes: tuple[AxisName, ...]  # paired axes are named like those of the weight
    out_axes: Axes  # the name of every axis of the result; None for an axis of size 1
    terms: int  # number of terms per element of the result; 0 for a lookup


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a primitive uses a weight."""

    # Returns a `Move` per output, after which the weight is still a weight; None if the low-rank
    # structure is lost.
    move: Callable[[Operand], list[Move] | None] | None = None
    each: bool = False  # output i depends on operand i only, so several operands may be weights
    elementwise: bool = False  # the operation is elementwise and independent of the shape
    # Returns how the weight is contracted; None if there is no low-rank form.
    read: Callable[[Operand], Use | None] | None = None
    # Computes equations for which `read` succeeded and that have the same data.
    compute: Callable[..., Any] | None = None
    # Returns the sub-jaxprs of the equation; None if this JAX has other parameters.
    open: Callable[[Any], Any] | None = None
    # Evaluates the equation with evaluated sub-jaxprs. Without it, `analyze` looks into the
    # sub-jaxprs, but `evaluate` materializes the weight.
    rebuild: Callable[..., Any] | None = None
