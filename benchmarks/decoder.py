"""A decoder in plain Linen, in which the module of the dense layers can be replaced.

The decoder contains no LoRA code. The hand-written rows pass a dense layer that contains the
factors; all other rows pass `nn.Dense` and wrap the model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

# Called as dense(features, name=...); returns a Linen module.
DenseFactory = Callable[..., nn.Module]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots-no-batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a decoder and of its batch.

    Args:
      layers: Blocks.
      width: Channels of the residual stream.
      hidden: Channels inside the gated feed-forward layer.
      heads: Query heads.
      key_heads: Key and value heads; each serves heads / key_heads query heads.
      vocabulary: Tokens in the vocabulary.
      batch: Batch size.
      length: Sequence length.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    key_heads: int
    vocabulary: int
    batch: int
    length: int

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.length


SIZES = {
    "tiny": Size(2, 32, 64, 4, 2, 64, 2, 8),  # for the tests of the benchmarks
    "384x6": Size(6, 384, 1024, 6, 6, 2048, 4, 256),
    "768x4": Size(4, 768, 2048, 12, 12, 2048, 4, 256),
    "1b": Size(16, 2048, 8192, 32, 8, 128256, 4, 1024),
    "8b": Size(32, 4096, 14336, 32, 8, 128256, 2, 1024),
}


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Compute causal attention without fused kernels.

    Args:
      q: (batch, length, heads, head_dim).
      k: (batch, length, key_heads, head_dim).
      v: (batch, length, key_heads, head_dim).

    Returns:
      (batch, length, heads * head_dim).
    """
    batch, length, heads, head_dim = q.shape
    if (shared := heads // k.shape[2]) > 1:
        k, v = (jnp.repeat(part, shared, axis=2) for part in (k, v))  # (b, t, h, d)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / head_dim**0.5  # (b, h, t, t)
    visible = jnp.tril(jnp.ones((length, length), bool))  # (t, t)
    scores = jnp.where(visible, scores.astype(jnp.float32), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)  # (b, h, t, t)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, heads * head_dim)


def attend_fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Compute the same as `attend`, with cuDNN's kernel on a GPU."""
    kernel = "cudnn" if jax.default_backend() == "gpu" else None
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kernel)
    return y.reshape(*y.shape[:2], -1)


class Block(nn.Module):
    """A pre-norm block with attention and a gated feed-forward layer."""

    size: Size
    dense: DenseFactory
    dtype: Any
    fused: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Map x (batch, length, width) to the same shape; None is the stacked output of a scan."""
        size = self.size
        norm = functools.partial(nn.RMSNorm, dtype=self.dtype, param_dtype=self.dtype)
        split = lambda y: y.reshape(*y.shape[:2], -1, size.head_dim)  # (b, t, h, d)  # noqa: E731
        keys = size.key_heads * size.head_dim
        h = norm(name="attention_norm")(x)
        q = split(self.dense(size.width, name="q_proj")(h))
        k = split(self.dense(keys, name="k_proj")(h))
        v = split(self.dense(keys, name="v_proj")(h))
        x = x + self.dense(size.width, name="o_proj")(self._attend(q, k, v))
        h = norm(name="feed_forward_norm")(x)
        gate = self.dense(size.hidden, name="gate_proj")(h)  # (b, t, hidden)
        up = self.dense(size.hidden, name="up_proj")(h)  # (b, t, hidden)
        return x + self.dense(size.width, name="down_proj")(nn.silu(gate) * up), None

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_fused(q, k, v) if self.fused else attend(q, k, v)


class Decoder(nn.Module):
    """A decoder from token ids to logits.

    Args:
      size: Shape of the model.
      dense: Creates the dense layers of the blocks, but not the output head.
      scan: Whether to stack the blocks with `nn.scan`.
      remat: Name of a rematerialization policy for the blocks.
      dtype: Dtype of parameters and computation; softmax and loss use float32.
      fused: Whether to use a fused attention kernel.
    """

    size: Size
    dense: DenseFactory
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    fused: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens (batch, length) to logits (batch, length, vocabulary)."""
        size = self.size
        types = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.Embed(size.vocabulary, size.width, name="embed", **types)(tokens)  # (b, t, width)
        block: Any = Block
        if self.remat != "none":
            # A scan needs no barrier against common subexpression elimination.
            policy = REMAT_POLICIES[self.remat]
            block = nn.remat(Block, policy=policy, prevent_cse=not self.scan)
        arguments = (size, self.dense, self.dtype, self.fused)
        if self.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                length=size.layers,
            )
            x, _ = stack(*arguments, name="blocks")(x)
        else:
            for layer in range(size.layers):
                x, _ = block(*arguments, name=f"block_{layer}")(x)
        x = nn.RMSNorm(name="norm", **types)(x)
        return nn.Dense(size.vocabulary, use_bias=False, name="head", **types)(x)


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Compute the mean next-token cross-entropy.

    Args:
      logits: (batch, length, vocabulary).
      tokens: (batch, length).

    Returns:
      A float32 scalar.
    """
    wide = logits[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(wide, tokens[:, 1:]).mean()
