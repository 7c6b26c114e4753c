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
    """The weight among the operands of an equation.

    Args:
      eqn: The equation.
      position: Position of the weight among the operands.
      axes: The name of every axis; None for an axis of size 1 that no factor has.
      values: The operands as arrays, or None if only names are available. Only steps of a move may
        read them.
    """

    eqn: Any
    position: int
    axes: Axes
    values: Sequence[Any] | None = None

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
    """A contraction, lookup or convolution of a weight with data.

    Args:
      kind: `"dense"`, `"embedding"` or `"conv"`.
      summed: Names of the weight's summed or looked-up axes.
      batched: Names of the weight's batch axes.
      data: Position of the data among the operands.
      data_axes: The name of every axis of the data; paired axes are named like those of the weight.
      out_axes: The name of every axis of the result; None for an axis of size 1.
      terms: Number of terms per element of the result; 0 for a lookup.
    """

    kind: str
    summed: tuple[AxisName | None, ...]
    batched: tuple[AxisName | None, ...]
    data: int
    data_axes: tuple[AxisName, ...]
    out_axes: tuple[AxisName | None, ...]
    terms: int


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a primitive uses a weight.

    Args:
      move: Returns a `Move` per output, after which the weight is still a weight; None if the
        low-rank structure is lost.
      each: Whether output i depends on operand i only, so that several operands may be weights.
      elementwise: Whether the operation is elementwise and independent of the shape.
      read: Returns how the weight is contracted; None if there is no low-rank form.
      compute: Computes equations for which `read` succeeded and that have the same data.
      open: Returns the sub-jaxprs of the equation; None if this JAX has other parameters.
      rebuild: Evaluates the equation with evaluated sub-jaxprs. Without it, `analyze` looks into
        the sub-jaxprs, but `evaluate` materializes the weight.
    """

    move: Callable[[Operand], list[Move] | None] | None = None
    each: bool = False
    elementwise: bool = False
    read: Callable[[Operand], Use | None] | None = None
    compute: Callable[..., Any] | None = None
    open: Callable[[Any], Any] | None = None
    rebuild: Callable[..., Any] | None = None
