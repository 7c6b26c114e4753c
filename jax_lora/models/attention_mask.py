"""Which keys a query attends to, in the form that the chosen attention kernel needs.

dense    a (tokens, keys) mask for XLA; any mask, any device
cudnn    GPU, half precision: causal, with a window, or packed with a bias made once for all layers
splash   TPU: causal, windows, segments and soft caps
blocks   everything else that is long: pure JAX, one block of scores at a time
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_lora.models.decoder_inputs import MaskInputs, visible

ATTENTION = ("auto", "dense", "flash")
DENSE, CUDNN, SPLASH, BLOCKS = "dense", "cudnn", "splash", "blocks"

# Below, a dense mask and its scores are small, and one matmul is faster than many.
_SHORT = 1024
_NO_WINDOW = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A mask for one kernel, made once outside of the layers. Every mask is causal.

    Attributes:
      kernel: `"dense"`, `"cudnn"`, `"splash"` or `"blocks"`.
      window: Number of most recent keys that are visible, for cudnn and splash; None: all.
      mesh: Devices that share the rows of a batch and the heads; None: one. For splash.
      dense: (batch or 1, 1, tokens, keys) booleans; None: causal. For dense.
      segments: (batch, tokens) int32; tokens attend to their own segment. For splash and blocks.
      bias: (batch, 1, tokens, tokens), added to the scores: 0, or a large negative value between
        different segments. For cudnn.
      recent: int32 scalar, the window as data, which may differ between layers. For blocks.
    """

    kernel: str = dataclasses.field(metadata={"static": True}, default=DENSE)
    window: int | None = dataclasses.field(metadata={"static": True}, default=None)
    mesh: Mesh | None = dataclasses.field(metadata={"static": True}, default=None)
    dense: jax.Array | None = None
    segments: jax.Array | None = None
    bias: jax.Array | None = None
    recent: jax.Array | None = None


def choose_kernel(
    attention: str,
    platform: str,
    *,
    dtype: Any,
    head_dim: int,
    tokens: int,
    cached: bool = False,
    windows: int = 1,
    soft_cap: float | None = None,
) -> str:
    """Choose the attention kernel.

    Args:
      attention: One of `ATTENTION`. `"auto"` uses a fused kernel where the device has one;
        `"flash"` never makes dense scores.
      platform: Target platform: `"cpu"`, `"gpu"` or `"tpu"`.
      dtype: Dtype of queries, keys and values.
      head_dim: Channels of a head.
      tokens: Sequence length.
      cached: Whether a KV cache is read, whose filled part is not known in advance.
      windows: Number of different windows of the layers. One kernel serves all layers of a scan,
        so only `"blocks"` takes several.
      soft_cap: Soft cap on the scores, or None.

    Returns:
      The kernel.

    Example:
      >>> choose_kernel("auto", "gpu", dtype=jnp.bfloat16, head_dim=128, tokens=4096)
      'cudnn'
      >>> choose_kernel("auto", "cpu", dtype=jnp.float32, head_dim=128, tokens=4096)
      'dense'
    """
    flash = attention == "flash"
    if cached or attention == DENSE or (platform == "cpu" and not flash):
        return DENSE
    half = jnp.dtype(dtype).itemsize == 2
    if windows == 1:
        # Head sizes above 128 need a Hopper GPU for cuDNN.
        if platform == "gpu" and half and head_dim % 8 == 0 and head_dim <= 128 and not soft_cap:
            return CUDNN
        if platform == "tpu" and head_dim % 64 == 0 and tokens >= 128:
            return SPLASH
    return BLOCKS if flash or tokens >= _SHORT else DENSE


def make_masks(
    kernel: str,
    tokens: int,
    keys: int,
    given: MaskInputs,
    windows: Sequence[int | None],
    dtype: Any,
    mesh: Mesh | None = None,
) -> list[AttentionMask]:
    """Make the mask of each window.

    Args:
      kernel: From `choose_kernel`.
      tokens: Number of queries.
      keys: Number of keys; with a cache, its length.
      given: `attention_mask`, `segment_ids` and `filled`, as in `visible`.
      windows: Numbers of most recent keys that are visible; None: all.
      dtype: Dtype of queries, for a bias.
      mesh: Devices that share the rows of a batch and the heads; None: one device.

    Returns:
      Masks with the same structure, one per window.
    """
    # A window as long as the sequence masks nothing.
    windows = [None if each is None or each >= keys else each for each in windows]
    if kernel == DENSE:
        causal = all(each is None for each in (*given, *windows))
        dense = [None if causal else visible(tokens, keys, *given, each) for each in windows]
        return [AttentionMask(DENSE, dense=each) for each in dense]
    segments = _segments(*given[:2])
    if kernel == BLOCKS:
        recent = [jnp.int32(_NO_WINDOW if each is None else each) for each in windows]
        return [AttentionMask(BLOCKS, segments=segments, recent=each) for each in recent]
    bias = None
    if kernel == CUDNN and segments is not None:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        least = jnp.asarray(jnp.finfo(dtype).min / 2, dtype)
        bias, segments = jnp.where(same, jnp.zeros_like(least), least), None  # (b, 1, t, t)
    return [AttentionMask(kernel, each, mesh, None, segments, bias) for each in windows]


def _segments(attention_mask: jax.Array | None, segment_ids: jax.Array | None) -> jax.Array | None:
    """Give padding a segment of its own, so that no row of scores is masked as a whole."""
    if attention_mask is None:
        return segment_ids
    real = attention_mask.astype(bool)
    ids = jnp.zeros(real.shape, jnp.int32) if segment_ids is None else segment_ids
    return jnp.where(real, ids, jnp.full_like(ids, -1))
