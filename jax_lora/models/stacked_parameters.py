"""Read tensors into a parameter with a stack axis, or several.

Each tensor is written from its file into a stack that is updated in place, so peak memory is the
parameter and one layer's tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_lora.models.bitsandbytes_tensors import AnyTensor
from jax_lora.models.layout import Placement


def read_leaf(
    placement: Placement,
    shape: tuple[int, ...],
    tensors: Mapping[str, AnyTensor],
    dtype: Any,
    sharding: Sharding | None,
) -> jax.Array:
    """Read a parameter of shape (*stack, *rest); without a sharding, to the default device."""
    stack = ParameterStack(shape[: len(placement.stacked)], sharding)
    for index, names in placement.expand(shape):
        part = placement.from_files([tensors[name].read() for name in names], dtype)
        stack.write(index, part)
    return stack.array


class ParameterStack:
    """A parameter that is written one entry of its stack at a time.

    `sizes` are those of the stack axes; () for a parameter without a stack.
    """

    def __init__(self, sizes: tuple[int, ...], sharding: Sharding | None):
        """Start without memory: the first entry gives the shape and the dtype."""
        self._sizes, self._sharding = sizes, sharding
        self._array: jax.Array | None = None

    @property
    def array(self) -> jax.Array:
        """The parameter: (*stack, *rest).

        Raises:
          ValueError: Nothing was written.
        """
        if self._array is None:
            raise ValueError("a stack without entries")
        return self._array

    def write(self, index: tuple[int, ...], part: np.ndarray) -> None:
        """Write the entry at an index of the stack."""
        depth, sharding = len(self._sizes), self._sharding
        if not depth:
            self._array = _put(part, sharding)
            return
        if self._array is None:
            self._array = _zeros((*self._sizes, *part.shape), part.dtype, sharding)
        start = np.array([*index, *[0] * part.ndim], np.int32)
        part_here = _put(part.reshape((1,) * depth + part.shape), _of_part(sharding, depth))
        # Without waiting, layers would be read faster than written and accumulate in memory.
        self._array = jax.block_until_ready(_writer(sharding)(self._array, part_here, start))


def _put(value: np.ndarray, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.zeros(shape, dtype)
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


def _of_part(sharding: Sharding | None, depth: int) -> Sharding | None:
    """Return the sharding of one layer: that of the stack, not sharded along the stack axes."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    rest = tuple(sharding.spec)[depth:]
    return NamedSharding(sharding.mesh, PartitionSpec(*(None,) * depth, *rest))


@functools.lru_cache
def _writer(sharding: Sharding | None) -> Callable[..., jax.Array]:
    """Compile the writing of an entry into a stack, which is donated: there is no second one."""
    placed = {} if sharding is None else {"out_shardings": sharding}

    @functools.partial(jax.jit, donate_argnums=0, **placed)
    def write(stack: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(stack, part, tuple(start))

    return write
