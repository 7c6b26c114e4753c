"""Quantize the kernels of a model while they are read from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Sharding

from jax_lora.config import LoraConfig
from jax_lora.errors import ModelError
from jax_lora.kernels.kernel import Kernel
from jax_lora.kernels.targets import select
from jax_lora.models.bitsandbytes_tensors import AnyTensor, NF4Tensor
from jax_lora.models.layout import Layout, Placement
from jax_lora.models.model_kernels import model_kernels
from jax_lora.models.stacked_parameters import ParameterStack
from jax_lora.quantization.weight_formats import NF4, WeightFormat
from jax_lora.quantize import (
    QuantizedWeight,
    array_shardings,
    check_method,
    encode,
    format_of,
    quantized_weight,
)


class Quantized(NamedTuple):
    """How a kernel is quantized, and whether the files hold its codes."""

    kernel: Kernel
    weight_format: WeightFormat
    is_stored: bool


def choose_formats(
    folder: Path,
    model: Any,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, AnyTensor],
    dtype: Any,
    method: str | None,
) -> dict[str, Quantized]:
    """Choose the kernels to quantize: those of `"all-linear"`, and those that are stored quantized.

    Without a method, only those that are stored quantized. The folder is for messages.

    Raises:
      ConfigError: The method is unknown.
      ModelError: The weights are stored in NF4, and another method is asked for.
    """
    layout = model.layout()
    stored = {path for path in shapes if _is_stored(layout, path, shapes[path], tensors)}
    if method is not None:
        check_method(method)
    if stored and method not in (None, NF4):
        got, expected = f"quantize={method!r}", "no other method: the folder is stored in NF4"
        fix = "leave out quantize, or take the model's original."
        raise ModelError(folder, got=got, expected=expected, fix=fix)
    if not stored and method is None:
        return {}
    leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}
    apply = lambda params, ids: model.apply({"params": params}, ids)  # noqa: E731
    kernels = dict(model_kernels(apply, unflatten_dict(leaves, sep="/")))
    wanted = stored & kernels.keys()
    if method is not None:
        wanted |= {*select(leaves, LoraConfig(targets="all-linear"), kernels)}
    formats = {path: format_of(kernels[path], dtype, method or NF4) for path in sorted(wanted)}
    return {path: Quantized(kernels[path], formats[path], path in stored) for path in formats}


def _is_stored(
    layout: Layout, path: str, shape: tuple[int, ...], tensors: Mapping[str, AnyTensor]
) -> bool:
    """Tell whether the codes of a parameter are in the files, as one matrix (out, in) each."""
    placement = layout[path]
    names = [name for _, each in placement.expand(shape) for name in each]
    is_matrix = placement.transposed and len(placement.tensors) == 1
    return is_matrix and all(isinstance(tensors[name], NF4Tensor) for name in names)


def read_quantized(
    path: str,
    quantized: Quantized,
    placement: Placement,
    tensors: Mapping[str, AnyTensor],
    sharding: Sharding | None,
) -> QuantizedWeight:
    """Read a kernel and quantize it, one layer at a time; the path is for messages."""
    kernel, made = quantized.kernel, quantized.weight_format
    sizes = kernel.shape[: len(placement.stacked)]
    shapes = quantized_weight(kernel, made, made.shapes(kernel.shape))
    places = {} if sharding is None else array_shardings(shapes, sharding)
    stacks = {name: ParameterStack(sizes, places.get(name)) for name in shapes.arrays}
    for index, names in placement.expand(kernel.shape):
        found = [tensors[name] for name in names]
        if quantized.is_stored and isinstance(found[0], NF4Tensor):
            arrays = found[0].codes(kernel.in_size)
        else:
            part = placement.from_files([each.read() for each in found], made.dtype)
            arrays = encode(path, made, part)
        for name, array in arrays.items():
            stacks[name].write(index, np.asarray(array))
    return quantized_weight(kernel, made, {name: each.array for name, each in stacks.items()})
