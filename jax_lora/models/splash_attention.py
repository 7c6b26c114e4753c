"""Attention on a TPU by JAX's splash attention kernel.

The kernel supports causal masks, windows, segments and soft caps, and skips blocks that are masked
as a whole.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mqa_single_device,
)
from jax.sharding import PartitionSpec

from jax_lora.models.attention_mask import AttentionMask
from jax_lora.models.mesh_sharding import TENSOR, row_spec

_LANES = 128  # lengths are multiples of it


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    scale: float,
    soft_cap: float | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attend causally on a TPU, as `attend` does.

    `interpret` runs the kernel's Python code, on any device; for tests.
    """
    attend = functools.partial(
        _attend, window=mask.window, scale=scale, soft_cap=soft_cap, interpret=interpret
    )
    if mask.mesh is None or mask.mesh.size == 1:
        return attend(q, k, v, mask.segments)
    rows = row_spec(mask.mesh, q.shape[0])
    tensor = mask.mesh.shape.get(TENSOR, 1)
    heads = TENSOR if k.shape[2] % tensor == 0 and tensor > 1 else None
    split = PartitionSpec(*(tuple(rows) or (None,)), None, heads, None)
    # XLA does not partition Pallas kernels, so every device runs one on its rows and heads.
    return jax.shard_map(
        attend,
        mesh=mask.mesh,
        in_specs=(split, split, split, rows),
        out_specs=split,
        check_vma=False,
    )(q, k, v, mask.segments)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    *,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    interpret: bool,
) -> jax.Array:
    batch, tokens, heads, channels = q.shape
    groups = k.shape[2]
    missing = -tokens % _LANES
    pad = [(0, 0), (0, missing), (0, 0), (0, 0)]
    q = (q.astype(jnp.float32) * jnp.float32(scale)).astype(q.dtype)
    q, k, v = (jnp.pad(x, pad) for x in (q, k, v))
    length = tokens + missing
    kernel = _kernel(heads // groups, length, window, soft_cap, interpret)
    q = q.reshape(batch, length, groups, heads // groups, channels).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))  # (b, g, t, d)
    if segments is None:  # a causal mask hides padding after the end
        y = jax.vmap(jax.vmap(kernel))(q, k, v)
    else:
        ids = jnp.pad(segments, pad[:2], constant_values=-2)
        of_row = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        y = jax.vmap(of_row)(q, k, v, SegmentIds(ids, ids))  # (b, g, h/g, t, d)
    y = y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, channels)
    return y[:, :tokens].astype(q.dtype)


@functools.lru_cache(maxsize=64)
def _kernel(
    heads: int, length: int, window: int | None, soft_cap: float | None, interpret: bool
) -> Any:
    shape = (length, length)
    one = CausalMask(shape) if window is None else LocalMask(shape, (window - 1, 0), 0)
    with jax.ensure_compile_time_eval():  # the kernel is cached beyond this trace
        return make_splash_mqa_single_device(
            MultiHeadMask([one] * heads),
            attn_logits_soft_cap=soft_cap,
            residual_checkpoint_name="attention_output",
            interpret=interpret,
        )
