"""What a rule says about one primitive. table.py holds the rules; interpretations read them.

A rule is written in names of axes alone wherever it can be. The same rule then serves every
interpretation: `evaluate` adds arrays, `analyze` has nothing but the names.
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
      position: Which operand it is.
      axes: The name of every axis of it; None for an axis of size 1 that no factor has.
      values: The operands as arrays, or None where only the names are known. Only steps of a move
        may read them, because steps are applied to arrays alone.
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
        """Return an operand as an array: for steps of a move."""
        if self.values is None:
            raise ValueError("only the names of the operands are known")
        return self.values[position]


@dataclasses.dataclass(frozen=True)
class Use:
    """How a weight is used up: contracted with data, looked up, or convolved.

    Args:
      kind: `"dense"`, `"embedding"` or `"conv"`.
      summed: Names of the weight's axes that are summed over or looked up by.
      batched: Names of the weight's axes that are paired with the data's and not summed.
      data: Position of the data among the operands.
      data_axes: The name of every axis of the data: the weight's own where they are paired.
      out_axes: The name of every axis of the result; None for an axis of size 1.
      terms: Length of the sum per element of the result; 0 for a lookup.
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
    """What a primitive does with a weight.

    Args:
      move: How the axes of the weight move: one `Move` per output, or None where the structure is
        lost. A weight stays a weight.
      each: Whether operand i becomes output i, so that several operands may be weights.
      elementwise: Whether every element is treated alike, whatever the shape.
      read: How the weight is used up, or None where it is not in a way that has a low-rank form.
      compute: The same on arrays, for one or several equations that read the same data.
      open: Which programs the equation holds, or None where this JAX lays them out differently.
      rebuild: Evaluates them and builds the equation again around them. A rule with `open` alone
        is only looked into: the weight is materialized before the equation is evaluated.
    """

    move: Callable[[Operand], list[Move] | None] | None = None
    each: bool = False
    elementwise: bool = False
    read: Callable[[Operand], Use | None] | None = None
    compute: Callable[..., Any] | None = None
    open: Callable[[Any], Any] | None = None
    rebuild: Callable[..., Any] | None = None
