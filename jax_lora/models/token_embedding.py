"""An embedding of tokens whose table can also be the output head."""

from __future__ import annotations

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype


class TokenEmbedding(nn.Embed):
    """Embed tokens, and compute logits from the same table without a transposed copy of it.

    `nn.Embed.attend` transposes the table before the product. With the loss in chunks, JAX moves
    the transposition out of the loop over the chunks, which stores a second table.
    """

    def attend(self, query: jax.Array) -> jax.Array:
        """Compute logits: (..., features) -> (..., embeddings)."""
        query, table = promote_dtype(query, self.embedding, dtype=self.dtype)
        contracted = ((query.ndim - 1,), (1,))
        return jax.lax.dot_general(query, table, (contracted, ((), ())))
