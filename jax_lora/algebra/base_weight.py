"""Base weights: an array, or a `Recipe` that computes the weight where it is used.

A quantized, compressed or offloaded base weight is a recipe: arrays, and a function of them. The
weight is computed inside `jax.checkpoint`, so that no residual holds it: it is computed once in the
forward pass and once in the backward pass.
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
    """A weight that is a function of stored arrays.

    Args:
      arrays: A pytree of arrays. In a layer stack, each has the stack axis first, so that a scan
        can slice the arrays instead of the weight.
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
        """Compute the weight."""
        return self.make(self.arrays)

    def then(
        self,
        operation: Callable[..., Array],
        key: Hashable,
        others: tuple[Any, ...],
        elementwise: bool,
    ) -> Recipe:
        """Return the recipe of `operation(weight, *others)` without computing it.

        `key` identifies the operation. `elementwise` tells whether it is elementwise and
        independent of the shape, so that slices of the arrays still give slices of the weight.
        """
        arrays = (self.arrays, others)
        make = _Then(self.make, key, operation, elementwise and not others)
        made = jax.eval_shape(make, arrays)
        sliceable = self.sliceable and elementwise and not others
        return Recipe(arrays, make, made.shape, made.dtype, sliceable)

    def entries(self, take: Callable[[Array], Array]) -> Array | None:
        """Compute entries along the first axis of the weight, without the others.

        Args:
          take: Selects entries along the first axis of an array: (n, *rest) -> (*ids, *rest).

        Returns:
          The entries, (*ids, *rest), or None if `make` has no method `entries(arrays, take)` or
          returns None.
        """
        select = getattr(self.make, "entries", None)
        return None if select is None else select(self.arrays, take)

    def at(self, arrays: Any) -> Recipe:
        """Return the recipe of a slice of the weight, given slices of the arrays."""
        return Recipe(arrays, self.make, self.shape[1:], self.dtype, self.sliceable)


@dataclasses.dataclass(frozen=True)
class _Then:
    """The composition of two functions. Compares by key, so that jit caches hit."""

    first: Callable[[Any], Array]
    key: Hashable
    second: Callable[..., Array] = dataclasses.field(compare=False)
    elementwise: bool

    def __call__(self, arrays: Any) -> Array:
        inner, others = arrays
        return self.second(self.first(inner), *others)

    def entries(self, arrays: Any, take: Callable[[Array], Array]) -> Array | None:
        select = getattr(self.first, "entries", None)
        if select is None or not self.elementwise:
            return None
        found = select(arrays[0], take)
        return None if found is None else self.second(found)


Base = Array | Recipe


def as_array(base: Base) -> Array:
    """Return a base weight as an array."""
    return base.made() if isinstance(base, Recipe) else base


def use(operation: Callable[..., Array], base: Base, *others: Any) -> Array:
    """Compute `operation(weight, *others)` without keeping the weight of a recipe as a residual."""
    if not isinstance(base, Recipe):
        return operation(base, *others)
    run = lambda arrays, *others: operation(base.make(arrays), *others)  # noqa: E731
    return jax.checkpoint(run)(base.arrays, *others)
