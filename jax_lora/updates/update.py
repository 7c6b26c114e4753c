"""Update: what every kind of update says about itself, so that nothing else has to ask its type."""

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
        """What a summary calls it: `"lora"`, `"dora"`, `"whole"` or `"rows"`."""
        ...

    @property
    def arrays(self) -> dict[str, Any]:
        """The trainable arrays by name."""
        ...

    @property
    def size(self) -> int:
        """Number of trainable elements; padding does not count."""
        ...

    def called(self, name: str) -> str:
        """Return what messages call one of the arrays."""
        ...

    def problem(self, shape: Sequence[int], holder: str = "tree") -> str | None:
        """Say why the update does not fit a leaf of this shape, or return None.

        Args:
          shape: Shape of the leaf.
          holder: What messages call the owner of the leaf.
        """
        ...

    def applied(self, base: Base, path: str, key: Any, rate: float) -> LowRank | Array:
        """Return what `lora_apply` computes with instead of the leaf.

        Args:
          base: The frozen leaf.
          path: Its path, for messages.
          key: Random key that switches dropout on, or None.
          rate: Dropout rate.
        """
        ...

    def merged(self, base: Array, sign: int) -> tuple[Array, Array]:
        """Add the update to its leaf.

        Args:
          base: The leaf.
          sign: 1 to add the update, -1 to subtract it.

        Returns:
          The sum before it is rounded to the leaf's type, and a mask of the elements that the
          update changes.
        """
        ...

    @property
    def irreversible(self) -> str | None:
        """Why a merged leaf does not determine its base, or None."""
        ...
