"""Contraction: an equation that contracts a low-rank value with data."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jax_lora.algebra import base_weight
from jax_lora.algebra.low_rank import LowRank, Parts, add_addend, add_parts
from jax_lora.transform.equations import evaluate_equation, with_operand
from jax_lora.transform.rules import Operand, Use
from jax_lora.transform.structural import rows_of_codes

Array = jax.Array
# The parts of a product with a value, whose gain is yet to be applied; None: not low-rank.
Result = tuple[LowRank, Parts] | None


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One equation that contracts a low-rank value with data."""

    eqn: Any
    inputs: tuple[Any, ...]  # its operands: arrays and one low-rank value
    weight: Operand  # the operand that is the low-rank value
    use: Use  # how the equation uses it

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

    def finished(self, result: Result) -> list[Array] | None:
        """Apply the gain and the epilogue to the parts of a product."""
        if result is None:
            return None
        (value, parts), axes = result, self.use.out_axes
        return [add_addend(value, add_parts(value, parts, axes), axes)]
