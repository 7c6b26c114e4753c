"""LoraPair: the factors of one kernel's update, and what stands beside them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora import lowrank
from jax_lora.kernel import Kernel
from jax_lora.labels import RANK, Label
from jax_lora.lowrank import LowRank

VECTORS = ("magnitude", "bias")  # what a pair may hold beside its factors, (*stack, *out) each
Scale = float | tuple[Any, ...]


def static(**options: Any) -> Any:
    """Declare a field of a pytree that is part of its structure, not a leaf."""
    return dataclasses.field(metadata={"static": True}, **options)


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

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that are there, by name."""
        named = {name: getattr(self, name) for name in ("a", "b", *VECTORS)}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def size(self) -> int:
        """Count the trainable numbers: all but the zeros that stand for what a kernel has not."""
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
    def a_labels(self) -> tuple[Label, ...]:
        """The kernel's axis behind every axis of `a`."""
        return (*self.stack_axes, *self.in_axes, RANK)

    @property
    def b_labels(self) -> tuple[Label, ...]:
        """The kernel's axis behind every axis of `b`."""
        return (*self.stack_axes, RANK, *self.out_axes)

    @property
    def vector_labels(self) -> tuple[Label, ...]:
        """The kernel's axis behind every axis of `magnitude` and `bias`."""
        return (*self.stack_axes, *self.out_axes)

    def scaled_b(self) -> tuple[Any, float]:
        """Return b and one number for the scale: scales that differ by layer go into b."""
        if isinstance(self.scale, tuple):
            scales = np.asarray(self.scale, self.b.dtype)  # (*stack,)
            spread = scales.reshape(scales.shape + (1,) * (self.b.ndim - scales.ndim))
            return self.b * spread, 1.0
        return self.b, self.scale

    def scaled_bias(self) -> Any:
        """Return scale * bias: what is added to a product. Layers that are left out have none."""
        scales = np.asarray(self.scale, self.bias.dtype)
        if self.ranks is not None:
            scales = np.where(np.asarray(self.ranks) > 0, scales, np.zeros_like(scales))
        inner = self.bias.ndim - scales.ndim if scales.ndim else 0
        return self.bias * scales.reshape(scales.shape + (1,) * inner)


def dense_delta(pair: LoraPair, dtype: Any = jnp.float32) -> jax.Array:
    """Form a pair's whole update, scale * a @ b, in the kernel's own layout.

    Args:
      pair: The factors.
      dtype: Type to compute in and return.

    Returns:
      An array of the kernel's shape.
    """
    b, scale = pair.scaled_b()
    stand_in = jax.ShapeDtypeStruct(pair.kernel_shape, jnp.dtype(dtype))
    labels = tuple(range(len(pair.kernel_shape)))
    args = (None, labels, pair.a_labels, pair.b_labels, scale, 0.0, "")
    return lowrank.delta(LowRank(stand_in, pair.a, b, *args), dtype)  # type: ignore[arg-type] # only its shape is read


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
