"""Low-rank values: gain * (W0 + scale * a @ b), carried through array operations.

Every axis of W0 has a name (named_axes.py). An axis is an input axis if `a` has its name, an
output axis if `b` has it, and a stack axis (layers, experts) if both have it. An operation on W0
changes the factors by the steps of a `Move` (moves.py); factored_product.py multiplies a low-rank
value with data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora.algebra.base_weight import Base, made
from jax_lora.algebra.named_array import NamedArray, product
from jax_lora.algebra.named_axes import AxisName

Array = jax.Array
Axes = tuple[AxisName | None, ...]
FACTORS = ("a", "b", "gain", "addend")  # the named arrays that W0's operations change as well


def static(**options: Any) -> Any:
    """Declare a field of a pytree that is part of its structure, not a leaf."""
    return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """W0 + scale * (a @ b summed over the rank), times a gain if there is one.

    Args:
      base: W0, frozen, in its present shape: an array or a recipe.
      axes: The name of every axis of W0; None for an axis of size 1 that no factor has.
      path: Path of the leaf, for messages.
      a: Factor with the stack axes, the input axes and the rank. None, like `b`, for a base that
        has no adapter.
      b: Factor with the stack axes, the rank and the output axes.
      scale: Multiplier of the product.
      key: Random key for dropout on the input of the factors, or None.
      rate: Dropout rate; 0 without a key.
      gain: Multiplier along stack and output axes (DoRA), or None.
      addend: What the epilogue of a product over all inputs adds to its result, along stack and
        output axes, or None. It is not part of the value.
    """

    base: Base
    axes: Axes = static()
    path: str = static()
    a: NamedArray | None = None
    b: NamedArray | None = None
    scale: float = static(default=1.0)
    key: Array | None = None
    rate: float = static(default=0.0)
    gain: NamedArray | None = None
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
          ValueError: There are none.
        """
        if self.a is None or self.b is None:
            raise ValueError(f"{self.path} has no adapter")
        return self.a, self.b

    def side(self, name: AxisName | None) -> tuple[bool, bool]:
        """Tell whether `a` and whether `b` have an axis of this name."""
        return (
            self.a is not None and name in self.a.axes,
            self.b is not None and name in self.b.axes,
        )

    @property
    def is_matrix(self) -> bool:
        """Whether both inputs and outputs are left: a single row or column is cheap to compute."""
        sides = {self.side(name) for name in self.axes if name is not None}
        return (True, False) in sides and (False, True) in sides

    @property
    def is_weight(self) -> bool:
        """Whether it is worth carrying: a matrix, or a base that is not an array yet."""
        return self.a is None or self.is_matrix

    def replace(self, **changes: Any) -> LowRank:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def on_factors(self, change: Callable[[NamedArray], NamedArray]) -> LowRank:
        """Change every named array that goes along with W0; W0 itself is left to the caller."""
        present = {name: factor for name in FACTORS if (factor := getattr(self, name)) is not None}
        return self.replace(**{name: change(factor) for name, factor in present.items()})


def is_low_rank(value: Any) -> bool:
    """Tell whether a value is a low-rank one."""
    return isinstance(value, LowRank)


def accumulation_dtype(dtype: Any) -> Any:
    """Return the type to accumulate products in: float64 for float64, else float32."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


# -----------------------------------------------------------------------------------------------
# The full weight
# -----------------------------------------------------------------------------------------------


def delta(
    a: NamedArray, b: NamedArray, scale: float, axes: Axes, shape: tuple[int, ...], dtype: Any
) -> Array:
    """Compute scale * a @ b in the shape of W0.

    Args:
      a: `(*stack, *in, rank)` in any order.
      b: `(*stack, rank, *out)` in any order.
      scale: Multiplier of the product.
      axes: The name of every axis of W0.
      shape: Shape of W0.
      dtype: Type to compute in and return.

    Returns:
      An array of W0's shape.
    """
    keep = {name for name in axes if name is not None}
    full = product(a.astype(dtype), b.astype(dtype), keep, "highest")  # (*stack, *in, *out)
    scaled = NamedArray(full.array * jnp.asarray(scale, dtype), full.axes)
    return scaled.arranged(axes, shape)


def materialize(value: LowRank) -> Array:
    """Compute the full weight in float32 or wider, rounded once to W0's type.

    Args:
      value: The low-rank value.

    Returns:
      An array of W0's shape and type.
    """
    base = made(value.base)
    if value.a is None or value.b is None:
        return base
    wide = accumulation_dtype(value.dtype)
    update = delta(value.a, value.b, value.scale, value.axes, value.shape, wide)
    return gained(value, base.astype(wide) + update, value.axes).astype(value.dtype)


# -----------------------------------------------------------------------------------------------
# The gain, and the epilogue of a product
# -----------------------------------------------------------------------------------------------


def gained(
    value: LowRank, array: Array, axes: Collection[AxisName | None], less: float = 0.0
) -> Array:
    """Multiply an array that has all axes of the gain by the gain.

    Args:
      value: The low-rank value; without a gain, the array is returned unchanged.
      array: The array.
      axes: The name of every axis of it.
      less: A number to subtract from the gain first.

    Returns:
      An array of the same shape and type; the product is computed in float32 or wider.
    """
    if value.gain is None:
        return array
    wide = jnp.promote_types(value.gain.array.dtype, accumulation_dtype(array.dtype))
    gain = NamedArray(value.gain.array.astype(wide) - less, value.gain.axes).spread(tuple(axes))
    return (array.astype(wide) * gain).astype(array.dtype)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a product of data with a low-rank value consists of.

    Args:
      base: The product with W0; with both, if there is no `update`.
      update: The product with the factors, or None where `base` includes it.
      again: The product of W0 with the data that the factors saw, where dropout changed them and
        there is a gain.
    """

    base: Array
    update: Array | None = None
    again: Array | None = None


def joined(value: LowRank, parts: Parts, axes: Collection[AxisName | None]) -> Array:
    """Add the parts of a product and apply the gain.

    With dropout, the gain of W0's product applies to the data that the factors saw, as only the
    trained branch sees dropout: base + (gain - 1) * again + gain * update.

    Args:
      value: The low-rank value.
      parts: The parts.
      axes: The name of every axis of the result.

    Returns:
      The product with the low-rank value.
    """
    if parts.again is not None and parts.update is not None:
        rescaled = gained(value, parts.again, axes, less=1.0)
        return parts.base + rescaled + gained(value, parts.update, axes)
    whole = parts.base if parts.update is None else lax.add(parts.base, parts.update)
    return gained(value, whole, axes)


def epilogue(value: LowRank, result: Array, axes: Collection[AxisName | None]) -> Array:
    """Add the addend, if there is one, to a product over all inputs.

    Args:
      value: The low-rank value.
      result: The product.
      axes: The name of every axis of it.

    Returns:
      An array of the same shape and type.
    """
    if value.addend is None:
        return result
    wide = accumulation_dtype(result.dtype)
    return (result.astype(wide) + value.addend.astype(wide).spread(tuple(axes))).astype(
        result.dtype
    )


def has_epilogue(
    value: LowRank, summed: Collection[AxisName | None], out_axes: Collection[AxisName | None]
) -> bool:
    """Tell whether a product that sums over these names is the one that the addend belongs to."""
    a, b = value.factors
    everything = {name for name in summed if name is not None} == {*a.axes} - {*b.axes}
    return everything and value.addend is not None and {*value.addend.axes} <= {*out_axes}


# -----------------------------------------------------------------------------------------------
# Dropout
# -----------------------------------------------------------------------------------------------


def dropped(value: LowRank, x: Array) -> Array:
    """Apply the value's dropout to the data that its factors multiply.

    Args:
      value: The low-rank value with the key of this use.
      x: Data of any shape.

    Returns:
      x with a share of its elements at zero and the rest scaled up; x itself without a key.
    """
    if value.key is None or value.rate == 0.0:
        return x
    keep = jax.random.bernoulli(value.key, 1.0 - value.rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - value.rate, x.dtype), jnp.zeros((), x.dtype))
