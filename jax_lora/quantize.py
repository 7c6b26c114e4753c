"""quantize and dequantize: base weights of one byte per element, each made where it is used."""

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
from jax_lora.kernels import flax_state
from jax_lora.kernels.kernel import Kernel
from jax_lora.kernels.targets import select

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class _Code:
    """How one byte stands for a number: the type of the codes, and the largest one."""

    dtype: Any
    largest: float


METHODS = {
    "float8": _Code(jnp.float8_e4m3fn, 448.0),
    "int8": _Code(jnp.int8, 127.0),
}


@dataclasses.dataclass(frozen=True)
class _Dequantize:
    """Make a weight from its codes and scales, at any number of leading stack axes."""

    method: str
    dtype: Any

    def __call__(self, arrays: Mapping[str, Array]) -> Array:
        wide = arrays["codes"].astype(jnp.float32) * arrays["scale"]
        return wide.astype(self.dtype)


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight(Recipe):
    """A kernel that is stored as codes of one byte and a scale per output.

    `lora_apply` accepts it as a leaf, with an adapter or without.
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
    """Store kernels in one byte per element, to fit a larger base model into memory.

    Every output has a scale of its own, the largest magnitude of its weights divided by the largest
    code. A weight is made from its codes where it is used, in the forward and in the backward pass,
    and no residual holds it.

    Args:
      variables: Parameters of any model, as arrays.
      method: `"float8"` (e4m3: about 2 significant digits at any magnitude) or `"int8"` (255 equal
        steps).
      targets: Which kernels, as in `LoraConfig`.
      exclude: Names and globs that win over `targets`.
      kernels: What `find_kernels` reported for the model; without it, two-dimensional leaves named
        `kernel` are (in, out).

    Returns:
      The same tree with a `QuantizedWeight` at every such kernel, for `lora_apply`.

    Raises:
      ConfigError: An unknown method.
      NoMatchError: A pattern that matches no kernel.
      StructureError: A kernel is quantized or adapted already, or is not finite.

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
                fix='"int8" is the more exact one for weights without outliers.',
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
    """Turn the quantized kernels of a tree into arrays again.

    Args:
      tree: A tree from `quantize`.
      dtype: Type of the arrays; by default that of the kernels before.

    Returns:
      The same tree with arrays only. Each differs from the kernel before by at most half a step of
      its codes.
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
                fix="Quantize the plain parameters, before jl.combine.",
            )
        )
    codes, scale, finite = _encoded(jnp.asarray(leaf), kernel.in_axes, method)
    if not isinstance(finite, Tracer) and not bool(finite):
        raise StructureError(
            format_error(
                f"quantize: {path}",
                got="elements that are NaN or Inf",
                expected="finite weights",
                fix="Load the model again, or exclude this kernel.",
            )
        )
    return QuantizedWeight(
        arrays={"codes": codes, "scale": scale},
        make=_Dequantize(method, jnp.dtype(leaf.dtype)),
        shape=tuple(leaf.shape),
        dtype=jnp.dtype(leaf.dtype),
        # Scales have one entry along an input axis, so a slice along it would miss the rest.
        sliceable=0 not in kernel.in_axes,
    )


def _encoded(w: Array, in_axes: tuple[int, ...], method: str) -> tuple[Array, Array, Array]:
    """Return codes like W0, scales of size 1 along the inputs, and whether W0 is finite."""
    code = METHODS[method]
    wide = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=in_axes, keepdims=True)  # 1 along the inputs
    scale = jnp.where(largest > 0, largest / code.largest, jnp.ones_like(largest))
    steps = wide / scale
    if jnp.issubdtype(code.dtype, jnp.integer):
        steps = jnp.round(steps)
    return steps.astype(code.dtype), scale, jnp.all(jnp.isfinite(wide))
