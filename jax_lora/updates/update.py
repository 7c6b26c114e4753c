"""Update: the interface of all kinds of updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import jax

from jax_lora.algebra.base_weight import Base
from jax_lora.algebra.low_rank import LowRank

Array = jax.Array


class Update(Protocol):
    """The trainable part of one leaf.

    Attributes:
      group: The field of `Adapter` that holds updates of this kind.
    """

    group: ClassVar[str]

    @property
    def kind(self) -> str:
        """The kind of update in a summary: `"lora"`, `"dora"`, `"whole"` or `"rows"`."""
        ...

    @property
    def arrays(self) -> dict[str, Any]:
        """The trainable arrays by name."""
        ...

    @property
    def size(self) -> int:
        """Number of trainable parameters, without padding."""
        ...

    def called(self, name: str) -> str:
        """Return what messages call the array of this name."""
        ...

    def problem(self, shape: Sequence[int], holder: str = "tree") -> str | None:
        """Return why the update does not fit a leaf of this shape, or None if it fits.

        Args:
          shape: Shape of the leaf.
          holder: What the reason calls the tree that holds the leaf.
        """
        ...

    def applied(self, base: Base, path: str, key: Any, rate: float) -> LowRank | Array:
        """Return the value that `lora_apply` uses instead of the leaf.

        Args:
          base: The base weight.
          path: Path of the leaf, for messages.
          key: Random key for dropout, or None.
          rate: Dropout rate.
        """
        ...

    def merged(self, base: Array, sign: int) -> tuple[Array, Array]:
        """Add the update to the base weight.

        Args:
          base: The base weight.
          sign: 1 to add the update, -1 to subtract it.

        Returns:
          The merged weight before rounding to the type of the base weight, and a mask of the
          elements that the update changes.
        """
        ...

    @property
    def irreversible(self) -> str | None:
        """Why the base weight cannot be recovered from a merged weight, or None."""
        ...
