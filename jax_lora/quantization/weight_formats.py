"""Formats of quantized weights: how a weight is encoded, and computed again where it is used.

A format encodes a weight as a dictionary of arrays and, when it is called, computes the weight from
them. Both work with any number of leading stack axes, so that a layer stack can be encoded one
layer at a time and sliced by a scan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_lora.quantization import nf4

Array = jax.Array
Arrays = Mapping[str, Any]
# Selects entries along the first axis of an array: (n, *rest) -> (*ids, *rest).
Take = Callable[[Array], Array]

Spec = tuple[Any, ...]  # a PartitionSpec's entry for each axis

NF4 = "nf4"


class WeightFormat(Protocol):
    """A hashable format of one weight."""

    @property
    def method(self) -> str:
        """The name of the format."""
        ...

    @property
    def dtype(self) -> Any:
        """Type of the weight."""
        ...

    def encode(self, w: Any) -> dict[str, Any]:
        """Encode a weight of shape (*stack, *rest)."""
        ...

    def __call__(self, arrays: Arrays) -> Array:
        """Compute the weight."""
        ...

    def entries(self, arrays: Arrays, take: Take) -> Array | None:
        """Compute entries along the first axis; None if several entries share codes."""
        ...

    def shapes(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the arrays of a weight of this shape."""
        ...

    def array_specs(self, spec: Spec) -> dict[str, Spec]:
        """Return how the arrays are sharded if the weight is sharded like this."""
        ...

    def weight_spec(self, codes: Spec) -> Spec:
        """Return how the weight is sharded if its codes are sharded like this."""
        ...


@dataclasses.dataclass(frozen=True)
class _Code:
    """The type of the codes and the largest code."""

    dtype: Any
    largest: float


BYTES = {
    "float8": _Code(jnp.float8_e4m3fn, 448.0),
    "int8": _Code(jnp.int8, 127.0),
}
METHODS = (*BYTES, NF4)


@dataclasses.dataclass(frozen=True)
class ByteFormat:
    """A byte per element, and a float32 scale per output.

    Args:
      method: `"int8"` or `"float8"`.
      dtype: Type of the weight.
      shared: Axes along which elements share a scale, counted from the end.
      used: Where the arrays are when the weight is computed, by name.
    """

    method: str
    dtype: Any
    shared: tuple[int, ...]
    used: tuple[tuple[str, NamedSharding], ...] = ()

    def encode(self, w: Any) -> dict[str, Array]:
        """Return codes of the weight's shape, and scales of size 1 along the shared axes."""
        code = BYTES[self.method]
        wide = jnp.asarray(w).astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), axis=self.shared, keepdims=True)
        scale = jnp.where(largest == 0, jnp.ones_like(largest), largest / code.largest)
        steps = wide / scale
        if jnp.issubdtype(code.dtype, jnp.integer):
            steps = jnp.round(steps)
        return {"codes": steps.astype(code.dtype), "scale": scale}

    def __call__(self, arrays: Arrays) -> Array:
        """Multiply the codes by their scales."""
        arrays = _gathered(arrays, self.used)
        wide = arrays["codes"].astype(jnp.float32) * arrays["scale"]
        return wide.astype(self.dtype)

    def entries(self, arrays: Arrays, take: Take) -> Array | None:
        """Select rows of codes, and of scales if each row has its own."""
        codes, scale = arrays["codes"], arrays["scale"]
        if scale.shape[0] != codes.shape[0]:
            return None
        return self({"codes": take(codes), "scale": take(scale)})

    def shapes(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the codes and scales."""
        return jax.eval_shape(self.encode, jax.ShapeDtypeStruct(shape, self.dtype))

    def array_specs(self, spec: Spec) -> dict[str, Spec]:
        """Shard the codes like the weight, and the scales along the axes that they have."""
        shared = {axis + len(spec) for axis in self.shared}
        scale = tuple(None if axis in shared else each for axis, each in enumerate(spec))
        return {"codes": spec, "scale": scale}

    def weight_spec(self, codes: Spec) -> Spec:
        """Return the same: a code for each element."""
        return codes


@dataclasses.dataclass(frozen=True)
class NF4Format:
    """Four bits per element: see nf4.py.

    The weight is encoded as a matrix whose rows are divided into blocks.

    Args:
      dtype: Type of the weight.
      axes: Axes of the weight in the order of the matrix, counted from the end.
      sizes: Their sizes.
      columns: Size of a row of the matrix; if it is not a multiple of a block, the whole weight is
        one row, padded with zeros.
      used: Where the arrays are when the weight is computed, by name.
    """

    dtype: Any
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    columns: int
    used: tuple[tuple[str, NamedSharding], ...] = ()

    @property
    def method(self) -> str:
        """The name of the format."""
        return NF4

    def encode(self, w: Any) -> dict[str, np.ndarray]:
        """Encode each matrix of a stack, on the host."""
        w = np.asarray(w)
        lead = w.shape[: w.ndim - len(self.sizes)]
        matrices = w.reshape(-1, *w.shape[len(lead) :]).transpose(
            0, *(axis + len(self.sizes) + 1 for axis in self.axes)
        )
        columns = math.prod(self.sizes) if self.columns % nf4.BLOCK else self.columns
        padding = [(0, 0), (0, -columns % nf4.BLOCK)]
        parts = [nf4.encode(np.pad(each.reshape(-1, columns), padding)) for each in matrices]
        return {
            name: np.stack([part[name] for part in parts]).reshape((*lead, *array.shape))
            for name, array in parts[0].items()
        }

    def __call__(self, arrays: Arrays) -> Array:
        """Decode the matrix and arrange its axes as in the weight."""
        matrix = nf4.decode(_gathered(arrays, self.used))  # (*stack, rows, columns)
        lead = matrix.shape[:-2]
        flat = matrix.reshape(*lead, -1)[..., : math.prod(self.sizes)]
        w = flat.reshape(*lead, *self.sizes).astype(self.dtype)
        order = np.argsort(self.axes) - len(self.axes)
        return w.transpose(*range(len(lead)), *(int(axis) + w.ndim for axis in order))

    def entries(self, arrays: Arrays, take: Take) -> Array | None:
        """Decode rows of the matrix, if they are the entries along the first axis."""
        is_in_order = self.axes == tuple(range(-len(self.axes), 0))
        rows, per_row = arrays["scales"].shape[0], math.prod(self.sizes[1:])
        if not is_in_order or rows != self.sizes[0] or per_row != self.columns:
            return None
        found = nf4.decode_rows(arrays, take)  # (*ids, columns)
        return found.reshape(*found.shape[:-1], *self.sizes[1:]).astype(self.dtype)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the codes, scales, spans and the offset."""
        stack = shape[: len(shape) - len(self.sizes)]
        columns = math.prod(self.sizes) if self.columns % nf4.BLOCK else self.columns
        rows, blocks = math.prod(self.sizes) // columns, -(-columns // nf4.BLOCK)
        return {
            "codes": jax.ShapeDtypeStruct((*stack, rows, blocks * nf4.BLOCK // 2), jnp.uint8),
            "scales": jax.ShapeDtypeStruct((*stack, rows, blocks), jnp.uint8),
            "spans": jax.ShapeDtypeStruct((*stack, -(-rows * blocks // nf4.SPAN)), jnp.float32),
            "offset": jax.ShapeDtypeStruct(stack, jnp.float32),
        }

    def array_specs(self, spec: Spec) -> dict[str, Spec]:
        """Shard rows and blocks of a matrix like the weight; the spans are on every device."""
        stack = spec[: len(spec) - len(self.axes)]
        matrix = tuple(spec[axis] for axis in self.axes) if self._is_matrix else (None, None)
        both = (*stack, *matrix)
        return {"codes": both, "scales": both, "spans": (*stack, None), "offset": stack}

    def weight_spec(self, codes: Spec) -> Spec:
        """Return how the weight's axes are sharded: those of a matrix are in another order."""
        stack, matrix = codes[:-2], codes[-2:]
        if not self._is_matrix:
            return (*stack, *(None,) * len(self.axes))
        return (*stack, *(matrix[axis] for axis in np.argsort(self.axes)))

    @property
    def _is_matrix(self) -> bool:
        return len(self.axes) == 2 and self.columns % nf4.BLOCK == 0


def _gathered(arrays: Arrays, used: tuple[tuple[str, NamedSharding], ...]) -> Arrays:
    """Move codes and scales between devices instead of the larger weight."""
    moved = dict(arrays)
    for name, sharding in used:
        # A scan has sliced the first axes away.
        spec = PartitionSpec(*sharding.spec[len(sharding.spec) - arrays[name].ndim :])
        moved[name] = lax.with_sharding_constraint(arrays[name], NamedSharding(sharding.mesh, spec))
    return moved


def weight_format(
    method: str,
    shape: tuple[int, ...],
    dtype: Any,
    *,
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    stack: tuple[int, ...] = (),
) -> WeightFormat:
    """Choose the format of a weight.

    Args:
      method: One of `METHODS`.
      shape: Shape of the weight.
      dtype: Type of the weight.
      rows: Axes whose entries have separate scales: the outputs of a dense kernel.
      columns: Axes along which elements share scales.
      stack: Axes of a stack. If they are not the first ones, no scan can slice the codes.
    """
    if method != NF4:
        shared = tuple(axis - len(shape) for axis in columns)
        return ByteFormat(method, jnp.dtype(dtype), shared)
    leading = stack == tuple(range(len(stack)))
    axes = (*rows, *columns) if leading else (*stack, *rows, *columns)
    return NF4Format(
        jnp.dtype(dtype),
        tuple(axis - len(shape) for axis in axes),
        tuple(shape[axis] for axis in axes),
        math.prod(shape[axis] for axis in columns),
    )


def is_finite(arrays: Arrays) -> Array:
    """Tell from the scales of a weight whether it has no NaN or Inf."""
    floats = [each for each in map(jnp.asarray, arrays.values()) if each.dtype == jnp.float32]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(each)) for each in floats]))
