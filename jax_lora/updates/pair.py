"""LoraPair: the LoRA factors of one kernel, optionally with a magnitude (DoRA) or a bias."""

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
from jax_lora.kernels.kernel import Kernel
from jax_lora.storage import flax_state

Array = jax.Array
VECTORS = ("magnitude", "bias")  # optional arrays of shape (*stack, *out)
Scale = float | tuple[Any, ...]


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraPair:
    """The LoRA factors of one kernel, with the update scale * a @ b.

    Args:
      a: Down-projection, `(*stack, *in, rank)`: A of the paper, transposed.
      b: Up-projection, `(*stack, rank, *out)`: B of the paper, transposed.
      in_axes: Input axes of the kernel.
      out_axes: Output axes of the kernel.
      stack_axes: Stack axes of the kernel, such as layers or experts.
      scale: alpha / rank. If it differs between layers, nested tuples of the shape of the stack.
      ranks: Rank of each kernel of a stack, as nested tuples of the shape of the stack, or None if
        all have the rank of the factors. Kernels of a lower rank are padded with zeros in both
        factors; these have zero gradients and stay zero. Rank 0 means no update.
      magnitude: Magnitude m of DoRA, `(*stack, *out)`, or None. With it, the weight is
        m * (W0 + scale * a @ b) / ||W0 + scale * a @ b||.
      bias: Bias of B, `(*stack, *out)`, or None. With it, the product with x is
        x W0 + scale * (x a b + bias). The bias is not part of the weight, so any other use of the
        leaf raises an error. Not compatible with a magnitude.

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
        """`"lora"`, or `"dora"` with a magnitude."""
        return "lora" if self.magnitude is None else "dora"

    @property
    def arrays(self) -> dict[str, Any]:
        """The trainable arrays by name."""
        named = {name: getattr(self, name) for name in ("a", "b", *VECTORS)}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def size(self) -> int:
        """Number of trainable parameters, without the padding of lower ranks."""
        factors = math.prod(self.a.shape) + math.prod(self.b.shape)
        vectors = sum(math.prod(array.shape) for array in self.arrays.values()) - factors
        if self.ranks is None:
            return factors + vectors
        ranks = np.asarray(self.ranks)
        factors = factors * int(ranks.sum()) // (ranks.size * self.rank)
        return factors + vectors * int((ranks > 0).sum()) // ranks.size

    @property
    def rank(self) -> int:
        """Rank of the factors: the largest rank of a stack."""
        return self.a.shape[-1]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        sizes = dict(zip((*self.stack_axes, *self.in_axes), self.a.shape, strict=False))
        sizes |= dict(zip(self.out_axes, self.b.shape[len(self.stack_axes) + 1 :], strict=True))
        return tuple(sizes[axis] for axis in sorted(sizes))

    @property
    def vector_axes(self) -> tuple[AxisName, ...]:
        """The axes of `magnitude` and `bias`, named by the axes of the kernel."""
        return (*self.stack_axes, *self.out_axes)

    @property
    def has_update(self) -> np.ndarray:
        """A mask that is True for layers with an update and broadcasts against a magnitude."""
        if self.ranks is None:
            return np.ones((1,) * len(self.vector_axes), bool)
        used = np.asarray(self.ranks) > 0  # (*stack,)
        return used.reshape(*used.shape, *(1,) * len(self.out_axes))

    def named(self) -> tuple[NamedArray, NamedArray, float]:
        """Return the factors with axes named by the axes of the kernel, and the scale.

        Scales that differ between layers are multiplied into b.
        """
        a = NamedArray(self.a, (*self.stack_axes, *self.in_axes, RANK))
        b, scale = self.b, self.scale
        if isinstance(scale, tuple):
            scales = np.asarray(scale, b.dtype)  # (*stack,)
            b, scale = b * scales.reshape(scales.shape + (1,) * (b.ndim - scales.ndim)), 1.0
        return a, NamedArray(b, (*self.stack_axes, RANK, *self.out_axes)), scale

    def scaled_bias(self) -> Any:
        """Return scale * bias, which is zero for layers without an update."""
        scales = np.asarray(self.scale, self.bias.dtype)
        if self.ranks is not None:
            scales = np.where(np.asarray(self.ranks) > 0, scales, np.zeros_like(scales))
        inner = self.bias.ndim - scales.ndim if scales.ndim else 0
        return self.bias * scales.reshape(scales.shape + (1,) * inner)

    def delta(self, dtype: Any = jnp.float32) -> Array:
        """Compute the update, scale * a @ b, in the layout of the kernel.

        Args:
          dtype: Type to compute in and return.

        Returns:
          An array of the kernel's shape.
        """
        a, b, scale = self.named()
        shape = self.kernel_shape
        return low_rank.delta(a, b, scale, tuple(range(len(shape))), shape, dtype)

    def of_layer(self, a: Any, b: Any) -> LoraPair:
        """Return the pair of one layer of a stack, without magnitude and bias.

        Args:
          a: Its down-projection: an entry of `a` along the first axis.
          b: Its up-projection.
        """
        lower = lambda axes: tuple(axis - 1 for axis in axes)  # noqa: E731
        return LoraPair(
            a, b, lower(self.in_axes), lower(self.out_axes), lower(self.stack_axes[1:]), self.scale
        )

    def called(self, name: str) -> str:
        """Return the name of an array in messages."""
        return name

    def problem(self, shape: Sequence[int], holder: str = "tree") -> str | None:
        """Return why the pair does not fit a leaf: other shapes, or both a magnitude and a bias."""
        if {"magnitude", "bias"} <= {*self.arrays}:
            return "has both a magnitude and a bias, which are not compatible"
        if tuple(shape) != self.kernel_shape:
            return f"the {holder} has shape {tuple(shape)}, the adapter is for {self.kernel_shape}"
        return None

    def applied(self, base: Base, path: str, key: Any, rate: float) -> LowRank:
        """Return the base weight and the factors as a low-rank value."""
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
        """Why the base weight cannot be recovered from a merged weight, or None."""
        if self.magnitude is None:
            return None
        return "a magnitude: ||W0 + scale * a @ b|| cannot be recovered from the merged weight"

    def with_magnitude(self, base: Base) -> LoraPair:
        """Add the initial magnitude: the norms of W0."""
        norms = dora.magnitude(base, self.in_axes, self.vector_axes).astype(self.a.dtype)
        used = jnp.where(self.has_update, norms, jnp.zeros((), norms.dtype))
        return dataclasses.replace(self, magnitude=used)

    def gain(self, base: Base) -> NamedArray:
        """Return the magnitude divided by the norms of W0 + scale * a @ b: `(*stack, *out)`."""
        a, b, scale = self.named()
        magnitude = NamedArray(self.magnitude, self.vector_axes)
        return dora.gain(base, a, b, scale, magnitude, self.has_update)


def empty_pair(
    kernel: Kernel, rank: int, scale: Scale, dtype: Any, ranks: tuple[Any, ...] | None = None
) -> LoraPair:
    """Return the shapes and types of a pair for a kernel.

    Args:
      kernel: The kernel.
      rank: Rank of the factors.
      scale: Scale of the update.
      dtype: Type of the factors.
      ranks: Rank of each kernel of a stack if they differ, or None.

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
