"""Trace a function of any arguments as a function of the arrays among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jax_lora.adapter import base_of
from jax_lora.algebra.base_weight import Recipe
from jax_lora.transform.programs import Body


class ArrayFunction:
    """`fn(*args, **kwargs)` as a function from its arrays to the arrays that it returns.

    `is_array` tells, by index and value, which leaves of the arguments are arrays. They are in
    `inputs`, by index.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_array: Callable[[int, Any], bool],
        is_leaf: Callable[[Any], bool] | None = None,
    ):
        """Flatten the arguments."""
        self._fn = fn
        self._leaves, self._treedef = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
        self.inputs = {i: leaf for i, leaf in enumerate(self._leaves) if is_array(i, leaf)}
        self._returned: tuple[list[Any], Any] | None = None

    def __call__(self, *arrays: jax.Array) -> list[jax.Array]:
        """Call the function with other arrays."""
        leaves = list(self._leaves)
        for place, array in zip(self.inputs, arrays, strict=True):
            leaves[place] = array
        args, kwargs = jax.tree.unflatten(self._treedef, leaves)
        results, treedef = jax.tree.flatten(self._fn(*args, **kwargs))
        # Other values (a string, a Python number) are returned unchanged.
        kept = [None if isinstance(leaf, jax.Array) else (leaf,) for leaf in results]
        self._returned = kept, treedef
        return [leaf for leaf in results if isinstance(leaf, jax.Array)]

    def trace(self) -> Body:
        """Trace the function, with an array of W0's shape and type for every adapted leaf."""
        return Body.of(jax.make_jaxpr(self)(*map(_stand_in, self.inputs.values())))

    def rebuild(self, arrays: list[Any]) -> Any:
        """Put computed arrays into the structure that the function returned when it was traced."""
        if self._returned is None:
            raise RuntimeError("rebuild requires that the function was traced before")
        kept, treedef = self._returned
        remaining = iter(arrays)
        return jax.tree.unflatten(
            treedef, [next(remaining) if leaf is None else leaf[0] for leaf in kept]
        )


def _stand_in(leaf: Any) -> Any:
    base = base_of(leaf)
    return jax.ShapeDtypeStruct(base.shape, base.dtype) if isinstance(base, Recipe) else base
