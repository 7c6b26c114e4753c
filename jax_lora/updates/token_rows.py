"""TokenRows: trained rows of an embedding table, such as those of new tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.algebra.base_weight import Base, as_array
from jax_lora.algebra.low_rank import static
from jax_lora.storage import flax_state


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Trained rows that replace rows of an embedding table.

    Args:
      values: The rows themselves and not a difference, `(rows, dim)`.
      indices: Index of the row of the table that each of them replaces, without duplicates.

    Example:
      >>> import jax.numpy as jnp
      >>> table = jnp.zeros((5, 2))
      >>> rows = TokenRows(values=jnp.ones((2, 2)), indices=(1, 4))
      >>> rows.put(table)[:, 0].tolist()
      [0.0, 1.0, 0.0, 0.0, 1.0]
    """

    values: Any
    indices: tuple[int, ...] = static()
    group: ClassVar[str] = "rows"
    kind: ClassVar[str] = "rows"
    irreversible: ClassVar[str | None] = "trained rows, which replaced those of the base"

    @property
    def arrays(self) -> dict[str, Any]:
        """The trainable array by name."""
        return {"values": self.values}

    @property
    def size(self) -> int:
        """Number of trainable parameters."""
        return math.prod(self.values.shape)

    def called(self, name: str) -> str:
        """Return the name of the array in messages."""
        return "the trained rows"

    @classmethod
    def of(cls, table: Any, indices: Sequence[int], dtype: Any = jnp.float32) -> TokenRows:
        """Copy rows of a table, so that training starts from the base model.

        Args:
          table: The table, `(vocab, dim)`.
          indices: Indices of the rows to train.
          dtype: Type of the trained rows.

        Returns:
          The rows.

        Example:
          >>> import jax.numpy as jnp
          >>> TokenRows.of(jnp.ones((5, 2), jnp.bfloat16), [3]).values.dtype.name
          'float32'
        """
        rows = tuple(int(index) for index in indices)
        return cls(jnp.asarray(table)[np.asarray(rows, np.int32)].astype(dtype), rows)

    def put(self, table: jax.Array) -> jax.Array:
        """Replace rows of a table; the gradient with respect to the table is zero.

        Args:
          table: The frozen table, `(vocab, dim)`.

        Returns:
          The table with the trained rows, in the type of the table.
        """
        where = np.asarray(self.indices, np.int32)  # (rows,)
        rows = self.values.astype(table.dtype)  # (rows, dim)
        return jax.lax.stop_gradient(table).at[where].set(rows, unique_indices=True)

    def problem(self, shape: Sequence[int], holder: str = "tree") -> str | None:
        """Return why the rows do not fit a table, or None.

        Args:
          shape: Shape of the table.
          holder: Name of the tree in the reason.
        """
        have, count = tuple(self.values.shape), len(self.indices)
        if len(shape) != 2 or have != (count, shape[1]):
            return f"the {holder} has shape {tuple(shape)}, the {count} rows have shape {have}"
        if len(set(self.indices)) != count:
            return "a row index occurs twice"
        outside = [index for index in self.indices if not 0 <= index < shape[0]]
        return f"the table of {shape[0]} rows has no row {outside[0]}" if outside else None

    def applied(self, base: Base, path: str, key: Any, rate: float) -> jax.Array:
        """Return the table with the trained rows."""
        return self.put(as_array(base))

    def merged(self, base: jax.Array, sign: int) -> tuple[jax.Array, jax.Array]:
        """Return the table with the trained rows."""
        return self.put(base), jnp.zeros(base.shape, bool)
