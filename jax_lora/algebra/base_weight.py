"""Recipe: a base weight that is stored as other arrays and made where it is used.

A quantized, compressed or offloaded base is a recipe: some arrays, and a function that makes the
weight from them. The weight is made inside `jax.checkpoint`, so no residual holds it: it exists for
one use in the forward pass and for one in the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recipe:
    """A weight that is made from other arrays.

    Args:
      arrays: A pytree of arrays. Where the weight is a stack of layers, each has the stack axis
        first, so that a scan can slice the arrays instead of the weight.
      make: A hashable function from `arrays` to the weight. It accepts arrays with and without
        leading stack axes.
      shape: Shape of the weight.
      dtype: Type of the weight.
      sliceable: Whether slicing the arrays along their first axis slices the weight.
    """

    arrays: Any
    make: Callable[[Any], Array] = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    sliceable: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the stored arrays in bytes."""
        return sum(array.nbytes for array in jax.tree.leaves(self.arrays))

    def made(self) -> Array:
        """Make the weight."""
        return self.make(self.arrays)

    def then(
        self,
        operation: Callable[..., Array],
        key: Hashable,
        others: tuple[Any, ...],
        elementwise: bool,
    ) -> Recipe:
        """Return the recipe of `operation(weight, *others)`: nothing is computed yet.

        Args:
          operation: What is done to the weight.
          key: A hashable value that identifies the operation.
          others: Arrays that the operation reads beside the weight.
          elementwise: Whether it treats every element alike, whatever the shape.

        Returns:
          The longer recipe.
        """
        arrays = (self.arrays, others)
        make = _Then(self.make, key, operation)
        made = jax.eval_shape(make, arrays)
        sliceable = self.sliceable and elementwise and not others
        return Recipe(arrays, make, made.shape, made.dtype, sliceable)

    def at(self, arrays: Any) -> Recipe:
        """Return the recipe of one slice of the weight, from slices of the arrays."""
        return Recipe(arrays, self.make, self.shape[1:], self.dtype, self.sliceable)


@dataclasses.dataclass(frozen=True)
class _Then:
    """One function after another. Equal to another one of the same key, so that jit caches hit."""

    first: Callable[[Any], Array]
    key: Hashable
    second: Callable[..., Array] = dataclasses.field(compare=False)

    def __call__(self, arrays: Any) -> Array:
        inner, others = arrays
        return self.second(self.first(inner), *others)


Base = Array | Recipe


def made(base: Base) -> Array:
    """Return a base as an array."""
    return base.made() if isinstance(base, Recipe) else base


def use(operation: Callable[..., Array], base: Base, *others: Any) -> Array:
    """Compute `operation(weight, *others)`, and keep no weight that had to be made.

    Args:
      operation: Any function of the weight and other arrays.
      base: An array or a recipe.
      *others: The other arrays.

    Returns:
      The result. A weight made from a recipe is made again for the backward pass.
    """
    if not isinstance(base, Recipe):
        return operation(base, *others)
    run = lambda arrays, *others: operation(base.make(arrays), *others)  # noqa: E731
    return jax.checkpoint(run)(base.arrays, *others)
