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

    The static fields are the kernel, the number of most recent keys that are visible (for cudnn and
    splash; None: all), and the devices that share the rows of a batch and the heads (for splash).
    """

    kernel: str = dataclasses.field(metadata={"static": True}, default=DENSE)
    window: int | None = dataclasses.field(metadata={"static": True}, default=None)
    mesh: Mesh | None = dataclasses.field(metadata={"static": True}, default=None)
    dense: jax.Array | None = None  # (batch or 1, 1, tokens, keys) booleans; None: causal
    segments: jax.Array | None = None  # (batch, tokens) int32, for splash and blocks
    bias: jax.Array | None = None  # (batch, 1, tokens, tokens), of the scores, for cudnn
    recent: jax.Array | None = None  # int32 scalar, the window of a layer, for blocks


def choose_kernel(
    attention: str,  # one of `ATTENTION`
    platform: str,  # target platform: `"cpu"`, `"gpu"` or `"tpu"`
    *,
    dtype: Any,  # dtype of queries, keys and values
    head_dim: int,
    tokens: int,  # sequence length
    cached: bool = False,  # whether a KV cache is read, whose filled part is not known in advance
    windows: int = 1,  # number of different windows of the layers
    soft_cap: float | None = None,
) -> str:
    """Choose the attention kernel.

    `"auto"` uses a fused kernel where the device has one; `"flash"` never makes dense scores. One
    kernel serves all layers of a scan, so only `"blocks"` takes several windows.

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
    """Make the mask of each window, for the kernel from `choose_kernel`; all have one structure.

    `given` are `attention_mask`, `segment_ids` and `filled`, as in `visible`. A window is a number
    of most recent keys, or None for all. `dtype` is that of queries, for a bias.
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
