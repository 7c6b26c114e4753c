"""Kernel: the axes and uses of one leaf that a contraction, lookup or convolution uses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from jax_lora.errors import AmbiguousKernelError


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a function uses one of its parameters.

    `find_kernels` finds the kernels of any function; `kernels_by_name` finds two-dimensional ones
    by their names.

    Args:
      path: Path of the leaf.
      shape: Shape of the leaf.
      dtype: Type of the leaf.
      kind: `"dense"`, `"embedding"` or `"conv"`.
      in_axes: Input axes: summed or looked-up axes.
      out_axes: Output axes.
      stack_axes: Axes over several kernels: layers, experts, batched heads.
      uses: Number of operations that use the leaf.
      flops: Floating-point operations of these operations in one call of the function.
      is_output_head: Whether its product is an output of the function.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    kind: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()
    uses: int = 1
    flops: int = 0
    is_output_head: bool = False

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Sizes of the input axes."""
        return tuple(self.shape[axis] for axis in self.in_axes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Sizes of the output axes."""
        return tuple(self.shape[axis] for axis in self.out_axes)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the stack axes."""
        return tuple(self.shape[axis] for axis in self.stack_axes)

    @property
    def in_size(self) -> int:
        """Number of inputs of one kernel of the stack."""
        return math.prod(self.in_shape)

    @property
    def out_size(self) -> int:
        """Number of outputs of one kernel of the stack."""
        return math.prod(self.out_shape)

    def pair_size(self, rank: int) -> int:
        """Count the parameters of a LoRA pair of this rank.

        Example:
          >>> kernel = Kernel("kernel", (4096, 4096), "float32", "dense", (0,), (1,))
          >>> kernel.pair_size(8)
          65536
        """
        return math.prod(self.stack_shape) * rank * (self.in_size + self.out_size)


class Kernels(dict[str, Kernel]):
    """The kernels of a function by path, and the matrices that cannot be adapted.

    Attributes:
      skipped: `{path: reason}` for every matrix that the function uses but that cannot be adapted.
        The reason has the operation and its `file:line`.
      acting: The paths in `skipped` that are contracted with data, so that users may expect an
        adapter.
      added: The paths in `skipped` that are only added to data, such as biases and positions.
    """

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        skipped: Mapping[str, str] | None = None,
        acting: frozenset[str] = frozenset(),
        added: frozenset[str] = frozenset(),
    ):
        """Copy the mappings."""
        super().__init__(kernels)
        self.skipped = dict(skipped or {})
        self.acting = acting
        self.added = added

    def within(self, paths: Collection[str]) -> Kernels:
        """Return the kernels at the given paths."""
        some = {path: kernel for path, kernel in self.items() if path in paths}
        return Kernels(some, self.skipped, self.acting, self.added)


def kernels_by_name(leaves: dict[str, Any]) -> dict[str, Kernel]:
    """Return a kernel with the axes (in, out) for every 2-D floating-point leaf named `kernel`.

    Args:
      leaves: Leaves by path.

    Returns:
      A dense `Kernel` for each such leaf.
    """
    return {
        path: Kernel(path, tuple(leaf.shape), leaf.dtype, "dense", (0,), (1,))
        for path, leaf in leaves.items()
        if path.split("/")[-1] == "kernel" and len(leaf.shape) == 2 and is_floating(leaf)
    }


def is_floating(leaf: Any) -> bool:
    """Tell whether a leaf has a floating-point type."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def ambiguous(path: str, leaf: Any) -> AmbiguousKernelError:
    """Build the error for a leaf whose shape does not determine the roles of its axes."""
    return AmbiguousKernelError(
        path,
        got=f"shape {tuple(leaf.shape)}, whose axes may be inputs, outputs or layers",
        expected="a two-dimensional leaf named 'kernel' of shape (in, out)",
        fix="Pass kernels=jl.find_kernels(model.apply, variables, *args) to lora_init.",
    )
