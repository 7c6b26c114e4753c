"""NF4: four bits per element, blocks of 64 elements with a scale each, scales in eight bits.

The codes, the scales and their order are those of bitsandbytes for the transposed kernel (out, in),
so that its checkpoints need no conversion:

    codes    two to a byte, the first in the upper half
    scales   the largest magnitude of a block, as an index into a table of 256 values
    spans    a factor for the table's values of 256 scales
    offset   the mean of all scales, which the table's values are relative to

Reference:
    Dettmers et al., QLoRA (arXiv:2305.14314), section 3 and appendix E; 8-bit Optimizers via
    Block-wise Quantization (arXiv:2110.02861), section 2, for the table of the scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # elements per scale
SPAN = 256  # scales per factor
_ROWS = 512  # rows that are encoded at a time, to bound temporary memory

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero: arXiv:2305.14314, E.
CODES = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


@functools.cache
def scale_table() -> np.ndarray:
    """Return the 256 values of scales: seven powers of ten, with more values for larger ones."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = _bounds(2**exponent + 1)
        middles = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * middles
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.array(values, np.float32))


def _bounds(count: int) -> np.ndarray:
    """Return equal steps from 0.1 to 1, rounded as in bitsandbytes: counted from the nearer end."""
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    return np.where(index < count // 2, first + step * index, last - step * index[::-1]).astype(
        np.float32
    )


def encode(w: np.ndarray) -> dict[str, np.ndarray]:
    """Quantize one matrix.

    Args:
      w: (rows, columns) of finite values; blocks are along the columns, a multiple of 64.

    Returns:
      `codes` (rows, columns / 2) and `scales` (rows, columns / 64), uint8, `spans` (scales / 256)
      and `offset` (), float32.
    """
    rows, columns = w.shape
    scales = np.empty((rows, columns // BLOCK), np.float32)
    codes = np.empty((rows, columns // 2), np.uint8)
    middles = (CODES[:-1] + CODES[1:]) / np.float32(2)
    for start in range(0, rows, _ROWS):
        part = np.asarray(w[start : start + _ROWS], np.float32).reshape(-1, columns // BLOCK, BLOCK)
        largest = np.abs(part).max(axis=-1)  # (rows, blocks)
        inverse = np.float32(1) / np.maximum(largest, np.float32(1e-38))
        index = np.searchsorted(middles, np.clip(part * inverse[..., None], -1, 1)).astype(np.uint8)
        index = index.reshape(-1, columns)
        scales[start : start + _ROWS] = largest
        codes[start : start + _ROWS] = index[:, ::2] << 4 | index[:, 1::2]
    return {"codes": codes, **_encode_scales(scales)}


def _encode_scales(scales: np.ndarray) -> dict[str, np.ndarray]:
    offset = scales.mean(dtype=np.float64).astype(np.float32)
    flat = (scales - offset).reshape(-1)
    missing = -flat.size % SPAN
    spans = np.abs(np.pad(flat, (0, missing)).reshape(-1, SPAN)).max(axis=1)
    each = np.repeat(np.where(spans > 0, spans, 1).astype(np.float32), SPAN)[: flat.size]
    table = scale_table()
    index = np.searchsorted((table[:-1] + table[1:]) / np.float32(2), flat / each).astype(np.uint8)
    return {"scales": index.reshape(scales.shape), "spans": spans, "offset": offset}


def decode(arrays: Mapping[str, Any]) -> jax.Array:
    """Compute the matrix: (..., rows, columns) float32, with any leading axes of `arrays`.

    Args:
      arrays: From `encode`, with any leading axes.

    Returns:
      The matrix.
    """
    codes, scales = arrays["codes"], arrays["scales"]
    return _values(codes, scales, _factors(arrays), arrays["offset"][..., None, None])


def decode_rows(arrays: Mapping[str, Any], take: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Compute rows of one matrix: (*ids, columns) float32.

    Args:
      arrays: From `encode`.
      take: Selects entries along the first axis of an array: (rows, *rest) -> (*ids, *rest).

    Returns:
      The rows.
    """
    codes, scales, factors = take(arrays["codes"]), take(arrays["scales"]), take(_factors(arrays))
    return _values(codes, scales, factors, arrays["offset"])


def _factors(arrays: Mapping[str, Any]) -> jax.Array:
    """Return the factor of each scale: (..., rows, blocks)."""
    scales = arrays["scales"]
    *lead, rows, blocks = scales.shape
    each = jnp.repeat(arrays["spans"], SPAN, axis=-1)[..., : rows * blocks]
    return each.reshape(*lead, rows, blocks)


def _values(codes: jax.Array, scales: jax.Array, factors: jax.Array, offset: jax.Array) -> Any:
    """Compute elements: (..., columns / 2), (..., blocks), (..., blocks) -> (..., columns)."""
    product = jnp.asarray(scale_table())[scales.astype(jnp.int32)] * factors
    # Compilers fuse a product into a sum, with one rounding; bitsandbytes rounds twice. They do not
    # fuse across a selection, and remove barriers.
    product = jnp.where(jnp.isfinite(product), product, jnp.zeros_like(product))
    largest = product + jnp.broadcast_to(offset, product.shape)
    both = jnp.stack([codes >> jnp.uint8(4), codes & jnp.uint8(15)], axis=-1)  # (..., c / 2, 2)
    values = jnp.asarray(CODES)[both.astype(jnp.int32)].reshape(*largest.shape, BLOCK)
    values = values * largest[..., None]
    return values.reshape(*largest.shape[:-1], -1)
