"""WholeLeaf: a fully trained leaf, such as a bias or a new output head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jax_lora.algebra.base_weight import Base
from jax_lora.storage import flax_state

Array = jax.Array


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeLeaf:
    """A trainable array that replaces its leaf.

    Args:
      value: The array, with the shape of the leaf.
    """

    value: Any
    group: ClassVar[str] = "whole"
    kind: ClassVar[str] = "whole"
    irreversible: ClassVar[str | None] = "a fully trained leaf, which replaced that of the base"

    @property
    def arrays(self) -> dict[str, Any]:
        """The trainable array by name."""
        return {"value": self.value}

    @property
    def size(self) -> int:
        """Number of trainable parameters."""
        return math.prod(self.value.shape)

    def called(self, name: str) -> str:
        """Return the name of the array in messages."""
        return "the fully trained leaf"

    def problem(self, shape: Sequence[int], holder: str = "tree") -> str | None:
        """Return why the array does not fit a leaf, or None."""
        want = tuple(self.value.shape)
        if tuple(shape) != want:
            return f"the {holder} has shape {tuple(shape)}, the adapter is for {want}"
        return None

    def applied(self, base: Base, path: str, key: Any, rate: float) -> Array:
        """Return the array in the type of the leaf."""
        return self.value.astype(base.dtype)

    def merged(self, base: Array, sign: int) -> tuple[Array, Array]:
        """Return the array. Its elements do not count as changed, so rounding causes no warning."""
        return self.value, jnp.zeros(base.shape, bool)
