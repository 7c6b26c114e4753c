"""Write parameters as a Hugging Face folder that `transformers` loads."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jax_lora.errors import ConfigError, ModelError, StructureError
from jax_lora.models.families import family_of
from jax_lora.models.family import Family
from jax_lora.models.layout import Layout, Placement
from jax_lora.models.parameter_shapes import parameter_shapes
from jax_lora.models.read_config import arguments_to_config
from jax_lora.models.text_parts import other_parts
from jax_lora.storage.atomic_writes import made_folder, replacing_both
from jax_lora.storage.locks import locked
from jax_lora.storage.safe_paths import given_path
from jax_lora.storage.safetensors_file import LazyTensor, write_tensors


def save(path: str | os.PathLike[str], model: Any, params: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors`, in the parameters' dtype, tensor by tensor.

    Use it for a base model or for merged parameters; adapters have their own formats.

    Args:
      path: The folder, made if absent; files of the same names are replaced when both are complete.
      model: The module that the parameters belong to.
      params: As `model.init` or `load` returns them, without the "params" level.

    Raises:
      StructureError: If the parameters are not exactly the model's; then nothing is written.
      ModelError: The folder cannot be written or has another writer, or the vision tower of the
        model cannot be read; an earlier model in the folder is unchanged.
    """
    family = family_of(model)
    flat = flatten_dict(dict(params), sep="/")
    _check(model, flat)
    folder = given_path(path, ModelError)
    tensors = _tensors(model.layout(), flat)
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    text = _config_text(family, model.config, dtype, tensors)
    if family.text_types:
        tensors |= other_parts(model.config)
    with made_folder(folder, ModelError), locked(folder, ModelError):
        names = "model.safetensors", "config.json"
        with replacing_both(folder, *names, ModelError) as (weights, settings):
            write_tensors(weights, tensors)
            settings.write_text(text, encoding="utf-8", newline="")


def _check(model: Any, flat: Mapping[str, Any]) -> None:
    expected = parameter_shapes(model)
    problems = [f"missing: {path} {expected[path]}" for path in expected if path not in flat]
    for path, leaf in flat.items():
        shape = getattr(leaf, "shape", None)
        if path not in expected:
            problems.append(f"extra: {path} {shape}")
        elif not isinstance(leaf, jax.Array | np.ndarray):
            problems.append(f"not an array: {path} is {type(leaf).__name__}")
        elif shape != expected[path]:
            problems.append(f"wrong shape: {path} is {shape}, expected {expected[path]}")
    if problems:
        got = "leaves that do not fit the model:\n    " + "\n    ".join(problems)
        expected = "exactly the model's parameters, as plain arrays"
        fix = (
            "pass params without the 'params' level; first merge an adapter into them, and "
            "call jl.dequantize on quantized ones."
        )
        raise StructureError("params", got=got, expected=expected, fix=fix)


def _tensors(layout: Layout, flat: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Return the tensors of the file, each of which is copied to the host when it is written."""
    tensors = {}
    for path, leaf in flat.items():
        placement, dtype = layout[path], np.dtype(leaf.dtype)
        shape = placement.tensor_shape(leaf.shape)
        for position, names in placement.expand(leaf.shape):
            for part, name in enumerate(names):
                read = functools.partial(_tensor, placement, leaf, position, part)
                tensors[name] = LazyTensor(shape, dtype, read)
    return tensors


def _tensor(placement: Placement, leaf: Any, position: tuple[int, ...], part: int) -> np.ndarray:
    return placement.to_files(np.asarray(leaf[position]))[part]


def _config_text(family: Family, config: Any, dtype: str, tensors: Mapping[str, LazyTensor]) -> str:
    """Return the text of `config.json`: the one that was read, if nothing has changed."""
    try:
        raw = json.loads(config.source)
    except ValueError:
        raw = {}
    was_quantized = raw.pop("quantization_config", None) is not None  # arrays are written
    governed: dict[str, Any] = {
        "architectures": raw.get("architectures") or list(family.architectures[:1]),
        "model_type": family.model_type,
        **family.to_json(config),
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    for name in {"dtype", "torch_dtype"} & governed.get("text_config", {}).keys():
        governed["text_config"][name] = dtype
    stored = raw.get("dtype") or raw.get("torch_dtype")
    same_model = raw.get("architectures") in (None, governed["architectures"])
    unchanged = stored == dtype and same_model and not was_quantized
    if raw and unchanged and _reads_as(raw, family, config, tensors):
        return config.source
    return json.dumps({**raw, **governed}, indent=2, sort_keys=True) + "\n"


def _reads_as(
    raw: dict[str, Any], family: Family, config: Any, tensors: Mapping[str, LazyTensor]
) -> bool:
    try:
        read = lambda name: tensors[name].read() if name in tensors else None  # noqa: E731
        return family.settle(arguments_to_config(raw, family), read) == config
    except (ConfigError, ModelError):
        return False
