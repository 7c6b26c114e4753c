"""quantize and dequantize: store base weights in four or eight bits per element."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_lora import paths
from jax_lora.adapter import is_weight
from jax_lora.algebra import nf4
from jax_lora.algebra.base_weight import Recipe
from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError, StructureError, format_error
from jax_lora.kernels.kernel import Kernel
from jax_lora.kernels.targets import select
from jax_lora.storage import flax_state

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class _Code:
    """A quantized format: the type of the codes and the largest code."""

    dtype: Any
    largest: float


BYTES = {
    "float8": _Code(jnp.float8_e4m3fn, 448.0),
    "int8": _Code(jnp.int8, 127.0),
}
NF4 = "nf4"
METHODS = (*BYTES, NF4)


@dataclasses.dataclass(frozen=True)
class _Dequantize:
    """Compute a weight from its codes and scales, with any number of leading stack axes."""

    method: str
    dtype: Any

    def __call__(self, arrays: Mapping[str, Array]) -> Array:
        wide = arrays["codes"].astype(jnp.float32) * arrays["scale"]
        return wide.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class _DequantizeNF4:
    """Compute a weight from its NF4 codes, with any number of leading stack axes.

    Args:
      dtype: Type of the weight.
      shape: Sizes of the outputs, then of the inputs.
      order: Axes that put these in the order of the weight, counted from the end.
    """

    dtype: Any
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def method(self) -> str:
        """The name of the format."""
        return NF4

    def __call__(self, arrays: Mapping[str, Array]) -> Array:
        matrix = nf4.decode(arrays)  # (*stack, rows, columns)
        lead = matrix.shape[:-2]
        flat = matrix.reshape(*lead, -1)[..., : math.prod(self.shape)]
        w = flat.reshape(*lead, *self.shape).astype(self.dtype)
        stack = tuple(range(len(lead)))
        return w.transpose(*stack, *(axis + w.ndim for axis in self.order))


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight(Recipe):
    """A kernel stored as codes of four or eight bits and their scales.

    `lora_apply` accepts it as a leaf, with or without an adapter.
    """

    @property
    def method(self) -> str:
        """`"nf4"`, `"int8"` or `"float8"`."""
        return self.make.method  # type: ignore[attr-defined] # always one of the two above


def quantize(
    variables: Any,
    method: str,
    *,
    targets: str | tuple[str, ...] = "all-linear",
    exclude: tuple[str, ...] = (),
    kernels: Mapping[str, Kernel] | None = None,
) -> Any:
    """Quantize kernels to four or eight bits per element, to fit a larger base model into memory.

    The eight-bit methods have a scale per output: the largest magnitude of its weights divided by
    the largest code. NF4 has a scale per 64 elements along the inputs, itself in eight bits: 4.13
    bits per element in all. It is computed on the host, one kernel of a stack at a time, and equals
    bitsandbytes' NF4 with double quantization.

    `lora_apply` dequantizes a weight where it is used, in the forward pass and again in the
    backward pass, so that no residual holds it.

    Args:
      variables: Parameters of any model, as arrays.
      method: `"nf4"` (16 values, close for a normal distribution), `"int8"` (255 equal steps) or
        `"float8"` (e4m3: about 2 significant digits at any magnitude).
      targets: Kernels to quantize, as in `LoraConfig`.
      exclude: Names and globs of kernels to leave out; takes precedence over `targets`.
      kernels: The result of `find_kernels` for the model. Without it, two-dimensional leaves named
        `kernel` have the axes (in, out).

    Returns:
      The tree with a `QuantizedWeight` at every selected kernel, for `lora_apply`.

    Raises:
      ConfigError: The method is unknown.
      NoMatchError: A pattern matches no kernel.
      StructureError: A kernel is already quantized or adapted, or has NaN or Inf.

    Reference:
      Dettmers et al., QLoRA (arXiv:2305.14314), section 3, for NF4.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> stored = quantize(params, "int8")
      >>> params["kernel"].nbytes, stored["kernel"].nbytes
      (8192, 2176)
      >>> model = lambda params, x: x @ params["kernel"]
      >>> y = jl.lora_apply(model)(stored, jnp.ones((4, 64)))
      >>> bool((y == model(dequantize(stored), jnp.ones((4, 64)))).all())
      True
    """
    if method not in METHODS:
        raise ConfigError(
            format_error(
                "quantize: method",
                got=repr(method),
                expected=f"one of {', '.join(METHODS)}",
                fix='Use "nf4" for the least memory, or "int8" for the highest accuracy.',
            )
        )
    leaves, treedef = paths.flatten_with_paths(variables, is_leaf=is_weight)
    config = LoraConfig(targets=targets, exclude=exclude)
    chosen = select(dict(leaves), config, kernels)
    quantized = [
        _quantized(path, leaf, chosen[path], method) if path in chosen else leaf
        for path, leaf in leaves
    ]
    return jax.tree.unflatten(treedef, quantized)


def dequantize(tree: Any, dtype: Any = None) -> Any:
    """Convert the quantized kernels of a tree to arrays.

    Args:
      tree: A tree from `quantize`.
      dtype: Type of the arrays; by default the type before quantization.

    Returns:
      The tree with arrays only. An element differs from the original by at most half a
      quantization step.
    """
    make = lambda leaf: leaf.made().astype(dtype or leaf.dtype)  # noqa: E731
    return jax.tree.map(
        lambda leaf: make(leaf) if isinstance(leaf, Recipe) else leaf, tree, is_leaf=is_weight
    )


def _quantized(path: str, leaf: Any, kernel: Kernel, method: str) -> QuantizedWeight:
    if is_weight(leaf):
        raise StructureError(
            format_error(
                f"quantize: {path}",
                got=f"a {type(leaf).__name__}",
                expected="an array",
                fix="Call jl.quantize on the unquantized parameters, before jl.combine.",
            )
        )
    if method == NF4:
        return _nf4(path, leaf, kernel)
    codes, scale, finite = _encoded(jnp.asarray(leaf), kernel.in_axes, method)
    if not isinstance(finite, Tracer) and not bool(finite):
        raise _not_finite(path)
    return QuantizedWeight(
        arrays={"codes": codes, "scale": scale},
        make=_Dequantize(method, jnp.dtype(leaf.dtype)),
        shape=tuple(leaf.shape),
        dtype=jnp.dtype(leaf.dtype),
        # The scales have size 1 along input axes and cannot be sliced along them.
        sliceable=0 not in kernel.in_axes,
    )


def _not_finite(path: str) -> StructureError:
    return StructureError(
        format_error(
            f"quantize: {path}",
            got="elements that are NaN or Inf",
            expected="finite weights",
            fix="Load the model again, or pass exclude to leave out this kernel.",
        )
    )


def _nf4(path: str, leaf: Any, kernel: Kernel) -> QuantizedWeight:
    if isinstance(leaf, Tracer):
        raise StructureError(
            format_error(
                f"quantize: {path}",
                got="an array inside jax.jit",
                expected="concrete weights: NF4 is computed on the host",
                fix="Call jl.quantize outside of jit.",
            )
        )
    stack, rest = kernel.stack_axes, (*kernel.out_axes, *kernel.in_axes)
    leading = stack == tuple(range(len(stack)))
    # If the stack axes are not the first, they are part of one matrix, which no scan can slice.
    stack, rest = (stack, rest) if leading else ((), (*stack, *rest))
    w = np.asarray(leaf).transpose(*stack, *rest)
    lead, shape = w.shape[: len(stack)], w.shape[len(stack) :]
    columns = math.prod(kernel.in_shape)
    if columns % nf4.BLOCK:  # blocks then run on into the next output
        columns = math.prod(shape)
    parts = []
    for part in w.reshape(-1, math.prod(shape) // columns, columns):
        wide = np.asarray(part, np.float32)
        if not np.isfinite(wide).all():
            raise _not_finite(path)
        parts.append(nf4.encode(np.pad(wide, [(0, 0), (0, -columns % nf4.BLOCK)])))
    arrays = {
        name: jnp.asarray(np.stack([part[name] for part in parts]).reshape((*lead, *first.shape)))
        for name, first in parts[0].items()
    }
    order = np.argsort(rest) - len(rest)
    return QuantizedWeight(
        arrays=arrays,
        make=_DequantizeNF4(jnp.dtype(leaf.dtype), shape, tuple(map(int, order))),
        shape=tuple(leaf.shape),
        dtype=jnp.dtype(leaf.dtype),
        sliceable=bool(stack),
    )


def _encoded(w: Array, in_axes: tuple[int, ...], method: str) -> tuple[Array, Array, Array]:
    """Return codes of W0's shape, scales of size 1 along the inputs, and whether W0 is finite."""
    code = BYTES[method]
    wide = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=in_axes, keepdims=True)  # 1 along the inputs
    scale = jnp.where(largest > 0, largest / code.largest, jnp.ones_like(largest))
    steps = wide / scale
    if jnp.issubdtype(code.dtype, jnp.integer):
        steps = jnp.round(steps)
    return steps.astype(code.dtype), scale, jnp.all(jnp.isfinite(wide))
