"""WholeLeaf: a leaf that is trained as a whole, such as a bias or a new output head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jax_lora.algebra.base_weight import Base
from jax_lora.kernels import flax_state

Array = jax.Array


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeLeaf:
    """A trainable array that replaces its leaf.

    Args:
      value: The array, of the leaf's shape.
    """

    value: Any
    group: ClassVar[str] = "whole"
    kind: ClassVar[str] = "whole"
    irreversible: ClassVar[str | None] = "a leaf that is trained whole, so merging replaced it"

    @property
    def arrays(self) -> dict[str, Any]:
        """The array."""
        return {"value": self.value}

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.value.shape)

    def called(self, name: str) -> str:
        """Return what messages call the array."""
        return "the leaf trained whole"

    def problem(self, shape: Sequence[int], holder: str = "tree") -> str | None:
        """Compare the shapes."""
        want = tuple(self.value.shape)
        if tuple(shape) != want:
            return f"the {holder} has shape {tuple(shape)}, the adapter is for {want}"
        return None

    def applied(self, base: Base, path: str, key: Any, rate: float) -> Array:
        """Return the array in the leaf's type."""
        return self.value.astype(base.dtype)

    def merged(self, base: Array, sign: int) -> tuple[Array, Array]:
        """Return the array; rounding it is part of the training result."""
        return self.value, jnp.zeros(base.shape, bool)
