"""quantize and dequantize: store base weights in four or eight bits per element."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_lora import paths
from jax_lora.adapter import base_of, is_weight
from jax_lora.algebra.base_weight import Recipe
from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError, StructureError
from jax_lora.kernels.kernel import Kernel
from jax_lora.kernels.targets import select
from jax_lora.quantization.weight_formats import (
    METHODS,
    NF4,
    WeightFormat,
    is_finite,
    weight_format,
)
from jax_lora.storage import flax_state


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
        return self.make.method  # type: ignore[attr-defined] # always a WeightFormat


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
      variables: Parameters of any model, as arrays, or as `jax.ShapeDtypeStruct`s to learn the
        sizes of the quantized model.
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
    check_method(method)
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


def is_quantized(tree: Any) -> bool:
    """Tell whether a tree has a `QuantizedWeight`."""
    leaves = jax.tree.leaves(tree, is_leaf=is_weight)
    return any(isinstance(base_of(leaf), QuantizedWeight) for leaf in leaves)


def _quantized(path: str, leaf: Any, kernel: Kernel, method: str) -> QuantizedWeight:
    if is_weight(leaf):
        raise StructureError(
            f"quantize: {path}",
            got=f"a {type(leaf).__name__}",
            expected="an array",
            fix="Call jl.quantize on the unquantized parameters, before jl.combine.",
        )
    if method == NF4 and isinstance(leaf, Tracer):
        raise StructureError(
            f"quantize: {path}",
            got="an array inside jax.jit",
            expected="concrete weights: NF4 is computed on the host",
            fix="Call jl.quantize outside of jit.",
        )
    made = format_of(kernel, leaf.dtype, method)
    return quantized_weight(kernel, made, encode(path, made, leaf))


def check_method(method: str) -> None:
    """Check the name of a method.

    Args:
      method: The name.

    Raises:
      ConfigError: The method is unknown.
    """
    if method not in METHODS:
        raise ConfigError(
            "quantize: method",
            got=repr(method),
            expected=f"one of {', '.join(METHODS)}",
            fix='Use "nf4" for the least memory, or "int8" for the highest accuracy.',
        )


def format_of(kernel: Kernel, dtype: Any, method: str) -> WeightFormat:
    """Choose the format of a kernel.

    A scale belongs to an output of a dense kernel, and to a row of an embedding table, so that a
    lookup selects rows of codes.

    Args:
      kernel: The kernel.
      dtype: Type of the weight.
      method: One of `METHODS`.

    Returns:
      The format.
    """
    rows, columns = kernel.out_axes, kernel.in_axes
    if kernel.kind == "embedding":
        rows, columns = columns, rows
    return weight_format(
        method, kernel.shape, dtype, rows=rows, columns=columns, stack=kernel.stack_axes
    )


def encode(path: str, made: WeightFormat, w: Any) -> dict[str, Any]:
    """Encode a weight, or one entry of its stack.

    Args:
      path: Path of the leaf, for messages.
      made: The format.
      w: The weight: (*stack, *rest) or (*rest).

    Returns:
      The arrays that represent it.

    Raises:
      StructureError: The weight has NaN or Inf.
    """
    if isinstance(w, jax.ShapeDtypeStruct):
        return dict(made.shapes(w.shape))
    arrays = made.encode(w)
    finite = is_finite(arrays)
    if not isinstance(finite, Tracer) and not bool(finite):
        raise StructureError(
            f"quantize: {path}",
            got="elements that are NaN or Inf",
            expected="finite weights",
            fix="Load the model again, or pass exclude to leave out this kernel.",
        )
    return arrays


def quantized_weight(
    kernel: Kernel, made: WeightFormat, arrays: Mapping[str, Any]
) -> QuantizedWeight:
    """Return the leaf that stands for a kernel.

    Args:
      kernel: The kernel.
      made: Its format.
      arrays: The arrays that represent it, with all axes of its stack.

    Returns:
      The leaf.
    """
    return QuantizedWeight(
        arrays={
            name: array if isinstance(array, jax.ShapeDtypeStruct) else jnp.asarray(array)
            for name, array in arrays.items()
        },
        make=made,
        shape=tuple(kernel.shape),
        dtype=jnp.dtype(made.dtype),
        sliceable=bool(kernel.stack_axes) and kernel.stack_axes[0] == 0,
    )


def array_shardings(weight: QuantizedWeight, sharding: Sharding) -> dict[str, Sharding]:
    """Choose the shardings of the arrays of a quantized kernel from that of the kernel.

    Args:
      weight: The quantized kernel, or its shapes.
      sharding: The sharding of the kernel. Axes that do not divide an array are not sharded.

    Returns:
      Name of an array -> its sharding.
    """
    if not isinstance(sharding, NamedSharding):
        return dict.fromkeys(weight.arrays, sharding)
    missing = weight.ndim - len(sharding.spec)
    specs = weight.make.array_specs((*sharding.spec, *(None,) * missing))  # type: ignore[attr-defined]
    return {
        name: NamedSharding(sharding.mesh, _dividing(sharding, array.shape, specs[name]))
        for name, array in weight.arrays.items()
    }


def gathered_as(weight: QuantizedWeight, sharding: NamedSharding) -> QuantizedWeight:
    """Choose where the arrays of a quantized kernel are when the weight is computed.

    On a mesh, codes that are sharded are then moved as codes, and not as the larger weight.

    Args:
      weight: The quantized kernel, or its shapes.
      sharding: The sharding of the kernel where it is used: without the axes of the mesh over which
        it is only stored.

    Returns:
      The same kernel, which is computed from gathered arrays.
    """
    used = tuple(sorted(array_shardings(weight, sharding).items()))
    make = dataclasses.replace(weight.make, used=used)  # type: ignore[type-var]
    return dataclasses.replace(weight, make=make)


def _dividing(
    sharding: NamedSharding, shape: tuple[int, ...], spec: tuple[Any, ...]
) -> PartitionSpec:
    """Leave out the axes of the mesh that do not divide an axis of the array."""

    def fits(size: int, names: Any) -> bool:
        names = names if isinstance(names, tuple) else (names,)
        return size % math.prod(sharding.mesh.shape[name] for name in names) == 0

    return PartitionSpec(
        *(
            names if names is not None and fits(size, names) else None
            for size, names in zip(shape, spec, strict=True)
        )
    )
