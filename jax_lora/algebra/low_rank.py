"""Low-rank values: gain * (W0 + scale * a @ b), kept in factors through array operations.

Every axis of W0 has a name (named_axes.py). An axis is an input axis if `a` has its name, an
output axis if `b` does, and a stack axis (layers, experts) if both do. The steps of a `Move`
(moves.py) apply an operation on W0 to the factors. factored_product.py multiplies the factors with
data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora.algebra.base_weight import Base, as_array
from jax_lora.algebra.named_array import NamedArray, product
from jax_lora.algebra.named_axes import AxisName

Array = jax.Array
Axes = tuple[AxisName | None, ...]


def static(**options: Any) -> Any:
    """Declare a dataclass field that is part of the treedef and not a leaf."""
    return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A weight W0 + scale * a @ b in factors, optionally multiplied by a gain."""

    base: Base  # W0 after the moves so far, frozen: an array or a recipe
    axes: Axes = static()  # the name of every axis of W0; None for size 1, which no factor has
    path: str = static()  # of the leaf, for messages
    a: NamedArray | None = None  # (*stack, *in, rank); None, like b, without an adapter
    b: NamedArray | None = None  # (*stack, rank, *out)
    scale: float = static(default=1.0)
    key: Array | None = None  # random key for dropout on the input of the factors
    rate: float = static(default=0.0)  # of dropout; 0 without a key
    gain: NamedArray | None = None  # multiplier along stack and output axes (DoRA)
    # Bias along stack and output axes, added to a product over all inputs; not part of the weight.
    addend: NamedArray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Type of the value."""
        return self.base.dtype

    @property
    def factors(self) -> tuple[NamedArray, NamedArray]:
        """Both factors.

        Raises:
          ValueError: The value has no factors.
        """
        if self.a is None or self.b is None:
            raise ValueError(f"{self.path} has no adapter")
        return self.a, self.b

    @property
    def named_arrays(self) -> dict[str, NamedArray]:
        """The arrays to which moves of W0 also apply, by field: those of them that it has."""
        fields = {field: getattr(self, field) for field in ("a", "b", "gain", "addend")}
        return {field: array for field, array in fields.items() if array is not None}

    def side(self, name: AxisName | None) -> tuple[bool, bool]:
        """Tell whether `a` and whether `b` have an axis of this name."""
        return (
            self.a is not None and name in self.a.axes,
            self.b is not None and name in self.b.axes,
        )

    @property
    def is_matrix(self) -> bool:
        """Whether it has input and output axes: a single row or column is cheap to materialize."""
        sides = {self.side(name) for name in self.axes if name is not None}
        return (True, False) in sides and (False, True) in sides

    @property
    def is_weight(self) -> bool:
        """Whether to keep it in factors: a matrix, or a recipe without an adapter."""
        return self.a is None or self.is_matrix

    def replace(self, **changes: Any) -> LowRank:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def on_factors(self, change: Callable[[NamedArray], NamedArray]) -> LowRank:
        """Apply a change to every named array; the caller changes W0."""
        return self.replace(**{field: change(each) for field, each in self.named_arrays.items()})


def is_low_rank(value: Any) -> bool:
    """Tell whether a value is a `LowRank`."""
    return isinstance(value, LowRank)


def accumulation_dtype(dtype: Any) -> Any:
    """Return the type to accumulate products in: float64 for float64, else float32."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def scaled(array: Array, scale: float, dtype: Any) -> Array:
    """Multiply an array in accumulation precision by the scale, then round once to a type."""
    return (array * jnp.asarray(scale, array.dtype)).astype(dtype)


# -----------------------------------------------------------------------------------------------
# The full weight
# -----------------------------------------------------------------------------------------------


def delta(
    a: NamedArray, b: NamedArray, scale: float, axes: Axes, shape: tuple[int, ...], dtype: Any
) -> Array:
    """Compute scale * a @ b in the axes and shape of W0.

    The axes of a, `(*stack, *in, rank)`, and of b, `(*stack, rank, *out)`, can be in any order.
    """
    keep = {name for name in axes if name is not None}
    full = product(a.astype(dtype), b.astype(dtype), keep, "highest")  # (*stack, *in, *out)
    scaled = NamedArray(full.array * jnp.asarray(scale, dtype), full.axes)
    return scaled.arranged(axes, shape)


def materialize(value: LowRank) -> Array:
    """Compute the full weight in float32 or wider, rounded once to W0's type."""
    base = as_array(value.base)
    if value.a is None or value.b is None:
        return base
    wide = accumulation_dtype(value.dtype)
    update = delta(value.a, value.b, value.scale, value.axes, value.shape, wide)
    return times_gain(value, base.astype(wide) + update, value.axes).astype(value.dtype)


# -----------------------------------------------------------------------------------------------
# The gain and the epilogue of a product
# -----------------------------------------------------------------------------------------------


def times_gain(
    value: LowRank, array: Array, axes: Collection[AxisName | None], less: float = 0.0
) -> Array:
    """Multiply an array by the gain minus `less`, if the value has a gain.

    The axes of the array include those of the gain. The product is computed in float32 or wider.
    """
    if value.gain is None:
        return array
    wide = jnp.promote_types(value.gain.array.dtype, accumulation_dtype(array.dtype))
    gain = NamedArray(value.gain.array.astype(wide) - less, value.gain.axes).spread(tuple(axes))
    return (array.astype(wide) * gain).astype(array.dtype)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a product of data with a low-rank value."""

    base: Array  # the product with W0, or with the whole weight if there is no `update`
    update: Array | None = None  # the low-rank product
    again: Array | None = None  # of W0 and the data after dropout, with both dropout and a gain


def add_parts(value: LowRank, parts: Parts, axes: Collection[AxisName | None]) -> Array:
    """Add the parts of a product and apply the gain.

    With dropout, which affects only the trained branch, the result is
    base + (gain - 1) * again + gain * update.
    """
    if parts.again is not None and parts.update is not None:
        rescaled = times_gain(value, parts.again, axes, less=1.0)
        return parts.base + rescaled + times_gain(value, parts.update, axes)
    whole = parts.base if parts.update is None else lax.add(parts.base, parts.update)
    return times_gain(value, whole, axes)


def add_addend(value: LowRank, result: Array, axes: Collection[AxisName | None]) -> Array:
    """Add the addend, if there is one, to a product over all inputs."""
    if value.addend is None:
        return result
    wide = accumulation_dtype(result.dtype)
    total = result.astype(wide) + value.addend.astype(wide).spread(tuple(axes))
    return total.astype(result.dtype)


def addend_applies(
    value: LowRank, summed: Collection[AxisName | None], out_axes: Collection[AxisName | None]
) -> bool:
    """Tell whether a product over these axes sums all inputs, so that the addend applies to it."""
    a, b = value.factors
    everything = {name for name in summed if name is not None} == {*a.axes} - {*b.axes}
    return everything and value.addend is not None and {*value.addend.axes} <= {*out_axes}


# -----------------------------------------------------------------------------------------------
# Dropout
# -----------------------------------------------------------------------------------------------


def apply_dropout(value: LowRank, x: Array) -> Array:
    """Apply the dropout of a value, which has the key of this use, to the data of its factors."""
    if value.key is None or value.rate == 0.0:
        return x
    keep = jax.random.bernoulli(value.key, 1.0 - value.rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - value.rate, x.dtype), jnp.zeros((), x.dtype))
