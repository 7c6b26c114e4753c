"""Read a Hugging Face folder's tensors into a module's stacked parameters.

Shapes are checked before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Sharding

from jax_lora.errors import ModelError
from jax_lora.hub.snapshots import local_folder
from jax_lora.models.bitsandbytes_tensors import AnyTensor, with_nf4_weights
from jax_lora.models.config_sizes import check_fit, check_sizes
from jax_lora.models.families import family_of, family_of_config
from jax_lora.models.family import Family
from jax_lora.models.parameter_shapes import parameter_shapes
from jax_lora.models.quantized_parameters import choose_formats, read_quantized
from jax_lora.models.read_config import read_config
from jax_lora.models.stacked_parameters import read_leaf
from jax_lora.models.tensor_files import DTYPES, open_tensors
from jax_lora.models.text_parts import is_other_part
from jax_lora.storage.pinned_files import check_pins

# One for all parameters, or a function of path and shape.
Shardings = Sharding | Callable[[str, tuple[int, ...]], Sharding]


def load(
    path: str | os.PathLike[str],
    dtype: Any = None,
    *,
    remat: bool | str = "none",
    attention: str = "auto",
    sharding: Shardings | None = None,
    quantize: str | None = None,
    ignore: Iterable[str] = (),
    pin: str | os.PathLike[str] | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Load a model from a Hugging Face folder.

    The architecture follows from `config.json`. No code in the folder is run, and no file outside
    it is read. Every layer is written directly to its devices, so peak memory is the model and one
    of its layers.

    Args:
      path: Folder with `config.json` and `model.safetensors`, or shards with their index; or, if
        there is no such path, a name on the Hugging Face Hub as a string, `"owner/name"` or
        `"owner/name@revision"`. It is downloaded unless the cache has it.
      dtype: Dtype of the parameters and the arithmetic; None: that of the files (float32 if they
        differ).
      remat: What layers keep for the backward pass: `"none"` (everything), `"names"` or `"full"`
        (only their inputs); see `remat_policy`.
      attention: `"auto"` (a fused kernel where the device has one), `"dense"` or `"flash"`.
      sharding: One `jax.sharding.Sharding` for all parameters, or a function of a parameter's path
        and shape; a stacked parameter's shape starts with the layers. None: the default device.
      quantize: Quantize the dense kernels, except the output head, as they are read: `"nf4"`,
        `"int8"` or `"float8"`, see `jl.quantize`. Peak memory is the quantized model and one
        layer's kernel. None: as stored, so a folder that bitsandbytes wrote in NF4 stays in NF4.
      ignore: Unknown fields of `config.json` that do not change the outputs.
      pin: File with the output of `sha256sum` for the folder; it is checked before anything is
        read.
      advance: Called with the number of parameters read so far and that of all.

    Returns:
      The module and its parameters: `model.apply({"params": params}, input_ids)`.

    Raises:
      ModelError: If the folder cannot be read, differs from what is pinned, needs a variant that is
        not implemented, or its tensors do not match its configuration (one message lists all
        differences).
      HubError: The name cannot be found or downloaded.

    Example:
      >>> from jax_lora.bundled import model_path
      >>> model, params = load(model_path())
      >>> params["layers"]["attn"]["q_proj"]["kernel"].dtype
      dtype(bfloat16)
    """
    folder = local_folder(path)
    if not folder.is_dir():
        fix = "check the path, or write a name on the Hub as owner/name."
        raise ModelError(
            folder, got="no such folder", expected="a Hugging Face model folder", fix=fix
        )
    if pin is not None:
        check_pins(folder, pin)
    config = read_config(folder, ignore)
    tensors = open_tensors(folder)
    family = family_of_config(config)
    tensors = _renamed(with_nf4_weights(tensors), family)
    check_sizes(folder, config, tensors)
    config = family.settle(config, partial(_read_if_there, tensors))
    if family.text_types:
        config = dataclasses.replace(config, folder=str(folder.absolute()))
        tensors = {name: each for name, each in tensors.items() if not is_other_part(name)}
    if getattr(config, "is_prefixed", True):
        tensors = _prefixed(tensors, family.prefix)
    # Without 64-bit mode there is no float64 to load into.
    dtype = jax.dtypes.canonicalize_dtype(dtype or _common_dtype(tensors))
    model = family.module(config, remat=remat, attention=attention, param_dtype=dtype)
    shapes, layout = parameter_shapes(model), model.layout()
    problems = list(_differences(model, shapes, tensors)) or list(_false_copies(model, tensors))
    check_fit(folder, problems, "exactly the tensors of this configuration")
    formats = choose_formats(folder, model, shapes, tensors, dtype, quantize)
    flat = {}
    done, total = 0, sum(map(math.prod, shapes.values()))
    for name, shape in shapes.items():
        where = sharding(name, shape) if callable(sharding) else sharding
        if name in formats:
            flat[name] = read_quantized(name, formats[name], layout[name], tensors, where)
        else:
            flat[name] = read_leaf(layout[name], shape, tensors, dtype, where)
        done += math.prod(shape)
        if advance is not None:
            advance(done, total)
    return model, unflatten_dict(flat, sep="/")


def _read_if_there(tensors: Mapping[str, AnyTensor], name: str) -> np.ndarray | None:
    return tensors[name].read() if name in tensors else None


def _renamed(tensors: dict[str, AnyTensor], family: Family) -> dict[str, AnyTensor]:
    """Rename tensors of older files as in current ones."""
    for pattern, replacement in family.renames:
        tensors = {re.sub(pattern, replacement, name): each for name, each in tensors.items()}
    return tensors


def _prefixed(tensors: dict[str, AnyTensor], prefix: str) -> dict[str, AnyTensor]:
    """Rename tensors as in files of a model with its head."""
    if not prefix or any(name.startswith(prefix) for name in tensors):
        return tensors
    return {prefix + name: tensor for name, tensor in tensors.items()}


# -----------------------------------------------------------------------------------------------
# Checks
# -----------------------------------------------------------------------------------------------


def _differences(
    model: Any, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, AnyTensor]
) -> Iterator[str]:
    family, known = family_of(model), set()
    layout, tied = model.layout(), getattr(model.config, "tie_word_embeddings", False)
    redundant = family.redundant + family.tied_copies * tied
    for path, shape in shapes.items():
        want = layout[path].tensor_shape(shape)
        for _, names in layout[path].expand(shape):
            known.update(names)
            for name in names:
                tensor = tensors.get(name)
                if tensor is None:
                    yield f"missing: {name} {want}"
                elif tensor.shape != want:
                    yield f"wrong shape: {name} is {tensor.shape}, expected {want}"
                elif tensor.dtype not in DTYPES:
                    yield f"wrong dtype: {name} is {tensor.dtype}, expected {' or '.join(DTYPES)}"
    for name in sorted(set(tensors) - known):
        if not any(re.fullmatch(pattern, name) for pattern in redundant):
            yield f"extra: {name} {tensors[name].shape}"


def _false_copies(model: Any, tensors: Mapping[str, AnyTensor]) -> Iterator[str]:
    """Find tensors that should be copies of a tied model's embedding and are different."""
    family = family_of(model)
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    layout = model.layout()
    originals = [layout[p].tensors[0] for p in (family.embedding, family.head_bias) if p in layout]
    for name in sorted(set(tensors) - set(originals)):
        if any(re.fullmatch(pattern, name) for pattern in family.tied_copies):
            if not any(_are_equal(tensors[each], tensors[name]) for each in originals):
                yield f"not a copy: {name} differs from {originals[0]} despite tie_word_embeddings"


def _are_equal(one: AnyTensor, other: AnyTensor) -> bool:
    return one.shape == other.shape and np.array_equal(one.read(), other.read())


def _common_dtype(tensors: Mapping[str, AnyTensor]) -> Any:
    """Return the dtype of the files; float32 if they differ, which represents both halves."""
    stored = {DTYPES[tensor.dtype] for tensor in tensors.values() if tensor.dtype in DTYPES}
    return stored.pop() if len(stored) == 1 else "float32"
