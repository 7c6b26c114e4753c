"""Contraction: one use of a low-rank value on arrays, as the rules that compute it see it."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax

from jax_lora.algebra import base_weight
from jax_lora.algebra.low_rank import LowRank
from jax_lora.transform.equations import bind, with_operand
from jax_lora.transform.rules import Operand, Use
from jax_lora.transform.strategies import Choice, Strategy

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One equation that uses a low-rank value up.

    Args:
      eqn: The equation.
      inputs: Its operands: arrays, and the value.
      weight: The value among them.
      use: How it is used.
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
        """Evaluate the equation on W0.

        Args:
          x: Data instead of the equation's own.
        """
        position = self.weight.position
        others = list(self.inputs)
        if x is not None:
            others[self.use.data] = x
        del others[position]

        def run(w: Array, *others: Array) -> Array:
            return bind(self.eqn, *with_operand(position, w, others))[0]

        return base_weight.use(run, self.value.base, *others)


class Evaluator(Protocol):
    """What the rules that compute a contraction need of the interpretation that calls them."""

    strategy: Strategy

    def note(self, contraction: Contraction, choice: Choice, **sizes: Any) -> None:
        """Record how a contraction is computed, and the sizes of its site, for `explain`."""
        ...
