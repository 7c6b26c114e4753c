"""LoraPair: the factors of one kernel's update (LoRA), with a magnitude (DoRA) or a bias."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.algebra import dora, low_rank
from jax_lora.algebra.base_weight import Base
from jax_lora.algebra.low_rank import LowRank, accumulation_dtype, static
from jax_lora.algebra.named_array import NamedArray
from jax_lora.algebra.named_axes import RANK, AxisName
from jax_lora.kernels import flax_state
from jax_lora.kernels.kernel import Kernel

Array = jax.Array
VECTORS = ("magnitude", "bias")  # what a pair may hold beside its factors, (*stack, *out) each
Scale = float | tuple[Any, ...]


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraPair:
    """The factors of one kernel's update, scale * a @ b, and its magnitude if it has one.

    Args:
      a: `(*stack, *in, rank)`; the paper's A transposed.
      b: `(*stack, rank, *out)`; the paper's B transposed.
      in_axes: Axes of the kernel that are inputs.
      out_axes: Axes of the kernel that are outputs.
      stack_axes: Axes of the kernel that hold several kernels.
      scale: alpha / rank; for layers that differ, nested tuples in the stack's shape.
      ranks: Rank of each kernel of a stack, as nested tuples in its shape, or None where all have
        the factors' own. A kernel of a lower rank has zeros beyond it in both factors, which have
        zero gradients and so stay zero; one of rank 0 has no update.
      magnitude: DoRA's m, `(*stack, *out)`: the norm of every output's weights, or None. The leaf
        then stands for m * (W0 + scale * a @ b) / its norms.
      bias: A bias of B, `(*stack, *out)`, or None: where data x are multiplied by the leaf, the
        result is x W0 + scale * (x a b + bias). It is no part of any weight, so all else that a
        model might do with the leaf is an error. Not beside a magnitude.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), equation 3.
      Liu et al., DoRA (arXiv:2402.09353), equation 5.
    """

    a: Any
    b: Any
    in_axes: tuple[int, ...] = static(default=(0,))
    out_axes: tuple[int, ...] = static(default=(1,))
    stack_axes: tuple[int, ...] = static(default=())
    scale: Scale = static(default=1.0)
    ranks: tuple[Any, ...] | None = static(default=None)
    magnitude: Any = None
    bias: Any = None

    group: ClassVar[str] = "pairs"

    @property
    def kind(self) -> str:
        """What a summary calls it."""
        return "lora" if self.magnitude is None else "dora"

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that are present, by name."""
        named = {name: getattr(self, name) for name in ("a", "b", *VECTORS)}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def size(self) -> int:
        """Number of trainable elements: the zeros that pad a lower rank do not count."""
        factors = math.prod(self.a.shape) + math.prod(self.b.shape)
        vectors = sum(math.prod(array.shape) for array in self.arrays.values()) - factors
        if self.ranks is None:
            return factors + vectors
        ranks = np.asarray(self.ranks)
        factors = factors * int(ranks.sum()) // (ranks.size * self.rank)
        return factors + vectors * int((ranks > 0).sum()) // ranks.size

    @property
    def rank(self) -> int:
        """Rank of the factors; in a stack whose layers differ, the largest."""
        return self.a.shape[-1]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel that the pair belongs to."""
        sizes = dict(zip((*self.stack_axes, *self.in_axes), self.a.shape, strict=False))
        sizes |= dict(zip(self.out_axes, self.b.shape[len(self.stack_axes) + 1 :], strict=True))
        return tuple(sizes[axis] for axis in sorted(sizes))

    @property
    def vector_axes(self) -> tuple[AxisName, ...]:
        """The axes of the kernel that `magnitude` and `bias` have, in their order."""
        return (*self.stack_axes, *self.out_axes)

    @property
    def has_update(self) -> np.ndarray:
        """A mask of the layers that have an update: broadcasts against a magnitude."""
        if self.ranks is None:
            return np.ones((1,) * len(self.vector_axes), bool)
        used = np.asarray(self.ranks) > 0  # (*stack,)
        return used.reshape(*used.shape, *(1,) * len(self.out_axes))

    def named(self) -> tuple[NamedArray, NamedArray, float]:
        """Return a and b with the axes of the kernel that theirs belong to, and the scale.

        Scales that differ by layer are multiplied into b.
        """
        a = NamedArray(self.a, (*self.stack_axes, *self.in_axes, RANK))
        b, scale = self.b, self.scale
        if isinstance(scale, tuple):
            scales = np.asarray(scale, b.dtype)  # (*stack,)
            b, scale = b * scales.reshape(scales.shape + (1,) * (b.ndim - scales.ndim)), 1.0
        return a, NamedArray(b, (*self.stack_axes, RANK, *self.out_axes)), scale

    def scaled_bias(self) -> Any:
        """Return scale * bias: the addend of a product. Layers without an update have none."""
        scales = np.asarray(self.scale, self.bias.dtype)
        if self.ranks is not None:
            scales = np.where(np.asarray(self.ranks) > 0, scales, np.zeros_like(scales))
        inner = self.bias.ndim - scales.ndim if scales.ndim else 0
        return self.bias * scales.reshape(scales.shape + (1,) * inner)

    def delta(self, dtype: Any = jnp.float32) -> Array:
        """Compute the full update, scale * a @ b, in the layout of the kernel.

        Args:
          dtype: Type to compute in and return.

        Returns:
          An array of the kernel's shape.
        """
        a, b, scale = self.named()
        shape = self.kernel_shape
        return low_rank.delta(a, b, scale, tuple(range(len(shape))), shape, dtype)

    def called(self, name: str) -> str:
        """Return what messages call one of the arrays."""
        return name

    def problem(self, shape: Sequence[int], holder: str = "tree") -> str | None:
        """Compare the shapes, and refuse a magnitude beside a bias."""
        if {"magnitude", "bias"} <= {*self.arrays}:
            return "has a magnitude and a bias, which do not go together"
        if tuple(shape) != self.kernel_shape:
            return f"the {holder} has shape {tuple(shape)}, the adapter is for {self.kernel_shape}"
        return None

    def applied(self, base: Base, path: str, key: Any, rate: float) -> LowRank:
        """Return W0 and the factors as a low-rank value."""
        a, b, scale = self.named()
        addend = None if self.bias is None else NamedArray(self.scaled_bias(), self.vector_axes)
        return LowRank(
            base=jax.tree.map(jax.lax.stop_gradient, base),
            axes=tuple(range(base.ndim)),
            path=path,
            a=a,
            b=b,
            scale=scale,
            key=key,
            rate=rate if key is not None else 0.0,
            gain=None if self.magnitude is None else self.gain(base),
            addend=addend,
        )

    def merged(self, base: Array, sign: int) -> tuple[Array, Array]:
        """Add the update, and apply the magnitude."""
        wide = accumulation_dtype(base.dtype)
        update = self.delta(wide)  # (*kernel)
        total, changed = base.astype(wide) + sign * update, update != 0  # (*kernel)
        if self.magnitude is not None:
            total = total * self.gain(base).spread(tuple(range(base.ndim))).astype(wide)
            changed = total != base.astype(wide)
        return total, changed

    @property
    def irreversible(self) -> str | None:
        """Why a merged kernel does not determine its base."""
        if self.magnitude is None:
            return None
        return "a magnitude, which replaced the norms of W0 + scale * a @ b"

    def with_magnitude(self, base: Base) -> LoraPair:
        """Add the magnitude that training starts from: the norms of W0."""
        norms = dora.magnitude(base, self.in_axes, self.vector_axes).astype(self.a.dtype)
        used = jnp.where(self.has_update, norms, jnp.zeros((), norms.dtype))
        return dataclasses.replace(self, magnitude=used)

    def gain(self, base: Base) -> NamedArray:
        """Return the magnitude over the norms of W0 + scale * a @ b: `(*stack, *out)`."""
        a, b, scale = self.named()
        magnitude = NamedArray(self.magnitude, self.vector_axes)
        return dora.gain(base, a, b, scale, magnitude, self.has_update)


def empty_pair(
    kernel: Kernel, rank: int, scale: Scale, dtype: Any, ranks: tuple[Any, ...] | None = None
) -> LoraPair:
    """Describe a pair for a kernel without allocating it.

    Args:
      kernel: The kernel to be adapted.
      rank: Rank of the pair.
      scale: Scale of the pair.
      dtype: Type of the factors.
      ranks: Rank of each kernel of a stack, where they differ.

    Returns:
      A `LoraPair` of `jax.ShapeDtypeStruct`s.
    """
    return LoraPair(
        a=jax.ShapeDtypeStruct((*kernel.stack_shape, *kernel.in_shape, rank), dtype),
        b=jax.ShapeDtypeStruct((*kernel.stack_shape, rank, *kernel.out_shape), dtype),
        in_axes=kernel.in_axes,
        out_axes=kernel.out_axes,
        stack_axes=kernel.stack_axes,
        scale=scale,
        ranks=ranks,
    )
