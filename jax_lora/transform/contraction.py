"""Contraction: an equation that contracts a low-rank value with data."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax

from jax_lora.algebra import base_weight
from jax_lora.algebra.low_rank import LowRank
from jax_lora.transform.equations import evaluate_equation, with_operand
from jax_lora.transform.rules import Operand, Use
from jax_lora.transform.strategies import Choice, Strategy
from jax_lora.transform.structural import rows_of_codes

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One equation that contracts a low-rank value with data.

    Args:
      eqn: The equation.
      inputs: Its operands: arrays and one low-rank value.
      weight: The operand that is the low-rank value.
      use: How the equation uses it.
    """

    eqn: Any
    inputs: tuple[Any, ...]
    weight: Operand
    use: Use

    @property
    def value(self) -> LowRank:
        """The low-rank value."""
        return self.inputs[self.weight.position]

    @property
    def data(self) -> Array:
        """The data."""
        return self.inputs[self.use.data]

    def on_base(self, x: Array | None = None) -> Array:
        """Evaluate the equation on W0, with `x` instead of the data if it is given."""
        rows = rows_of_codes(self.weight, self.value.base)
        if rows is not None:
            return rows
        position = self.weight.position
        others = list(self.inputs)
        if x is not None:
            others[self.use.data] = x
        del others[position]

        def run(w: Array, *others: Array) -> Array:
            return evaluate_equation(self.eqn, *with_operand(position, w, others))[0]

        return base_weight.use(run, self.value.base, *others)

    def on_base_after_dropout(self, x: Array) -> Array | None:
        """Evaluate the equation on W0 and x after dropout, which only a gain needs: see `Parts`."""
        needed = self.value.gain is not None and self.value.key is not None
        return self.on_base(x) if needed else None


class Evaluator(Protocol):
    """The part of `Evaluate` that the compute functions of rules use."""

    strategy: Strategy

    def note(self, contraction: Contraction, choice: Choice, **sizes: Any) -> None:
        """Record the form and the sizes of a contraction for `explain`."""
        ...
