"""quantize and dequantize: store base weights in one byte per element."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jax_lora import paths
from jax_lora.adapter import is_weight
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


METHODS = {
    "float8": _Code(jnp.float8_e4m3fn, 448.0),
    "int8": _Code(jnp.int8, 127.0),
}


@dataclasses.dataclass(frozen=True)
class _Dequantize:
    """Compute a weight from its codes and scales, with any number of leading stack axes."""

    method: str
    dtype: Any

    def __call__(self, arrays: Mapping[str, Array]) -> Array:
        wide = arrays["codes"].astype(jnp.float32) * arrays["scale"]
        return wide.astype(self.dtype)


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight(Recipe):
    """A kernel stored as one-byte codes and a scale per output.

    `lora_apply` accepts it as a leaf, with or without an adapter.
    """

    @property
    def method(self) -> str:
        """`"float8"` or `"int8"`."""
        return self.make.method  # type: ignore[attr-defined] # always a _Dequantize


def quantize(
    variables: Any,
    method: str,
    *,
    targets: str | tuple[str, ...] = "all-linear",
    exclude: tuple[str, ...] = (),
    kernels: Mapping[str, Kernel] | None = None,
) -> Any:
    """Quantize kernels to one byte per element, to fit a larger base model into memory.

    The scale of an output is the largest magnitude of its weights divided by the largest code.
    `lora_apply` dequantizes a weight where it is used, in the forward pass and again in the
    backward pass, so that no residual holds it.

    Args:
      variables: Parameters of any model, as arrays.
      method: `"float8"` (e4m3: about 2 significant digits at any magnitude) or `"int8"` (255 equal
        steps).
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
                fix='Use "int8", which is more accurate for weights without outliers.',
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
    codes, scale, finite = _encoded(jnp.asarray(leaf), kernel.in_axes, method)
    if not isinstance(finite, Tracer) and not bool(finite):
        raise StructureError(
            format_error(
                f"quantize: {path}",
                got="elements that are NaN or Inf",
                expected="finite weights",
                fix="Load the model again, or pass exclude to leave out this kernel.",
            )
        )
    return QuantizedWeight(
        arrays={"codes": codes, "scale": scale},
        make=_Dequantize(method, jnp.dtype(leaf.dtype)),
        shape=tuple(leaf.shape),
        dtype=jnp.dtype(leaf.dtype),
        # The scales have size 1 along input axes and cannot be sliced along them.
        sliceable=0 not in kernel.in_axes,
    )


def _encoded(w: Array, in_axes: tuple[int, ...], method: str) -> tuple[Array, Array, Array]:
    """Return codes of W0's shape, scales of size 1 along the inputs, and whether W0 is finite."""
    code = METHODS[method]
    wide = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=in_axes, keepdims=True)  # 1 along the inputs
    scale = jnp.where(largest > 0, largest / code.largest, jnp.ones_like(largest))
    steps = wide / scale
    if jnp.issubdtype(code.dtype, jnp.integer):
        steps = jnp.round(steps)
    return steps.astype(code.dtype), scale, jnp.all(jnp.isfinite(wide))
