"""Write parameters as a Hugging Face folder that `transformers` loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jax_lora.errors import ConfigError, ModelError, StructureError, format_error
from jax_lora.models.families import family_of
from jax_lora.models.family import Family
from jax_lora.models.layout import Layout
from jax_lora.models.parameter_shapes import parameter_shapes
from jax_lora.models.read_config import arguments_to_config
from jax_lora.storage.atomic_writes import made_folder, replacing_both
from jax_lora.storage.locks import locked
from jax_lora.storage.safetensors_file import write_tensors

__all__ = ["save"]


def save(path: str | os.PathLike[str], model: Any, params: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors`, in the parameters' dtype.

    Use it for a base model or for merged parameters; adapters have their own formats.

    Args:
      path: The folder, made if absent; files of the same names are replaced when both are complete.
      model: The module that the parameters belong to.
      params: As `model.init` or `load` returns them, without the "params" level.

    Raises:
      StructureError: If the parameters are not exactly the model's; then nothing is written.
      ModelError: The folder cannot be written or has another writer; an earlier model in it is
        unchanged.
    """
    family = family_of(model)
    flat = flatten_dict(dict(params), sep="/")
    _check(model, flat)
    folder = Path(path)
    tensors = _tensors(model.layout(), flat)
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    text = _config_text(family, model.config, dtype, tensors)
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
        raise StructureError(
            format_error(
                "params",
                got="leaves that do not fit the model:\n    " + "\n    ".join(problems),
                expected="exactly the model's parameters, as plain arrays",
                fix="pass params without the 'params' level; first merge an adapter into them, and "
                "call jl.dequantize on quantized ones.",
            )
        )


def _tensors(layout: Layout, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    tensors = {}
    for path, leaf in flat.items():
        leaf = np.asarray(leaf)
        for position, names in layout[path].expand(leaf.shape):
            tensors.update(zip(names, layout[path].to_files(leaf[position]), strict=True))
    return tensors


def _config_text(family: Family, config: Any, dtype: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Return the text of `config.json`: the one that was read, if nothing has changed."""
    try:
        raw = json.loads(config.source)
    except ValueError:
        raw = {}
    was_quantized = raw.pop("quantization_config", None) is not None  # arrays are written
    governed = {
        "architectures": raw.get("architectures") or list(family.architectures[:1]),
        "model_type": family.model_type,
        **family.to_json(config),
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    stored = raw.get("dtype") or raw.get("torch_dtype")
    same_model = raw.get("architectures") in (None, governed["architectures"])
    unchanged = stored == dtype and same_model and not was_quantized
    if raw and unchanged and _reads_as(raw, family, config, tensors):
        return config.source
    return json.dumps({**raw, **governed}, indent=2, sort_keys=True) + "\n"


def _reads_as(
    raw: dict[str, Any], family: Family, config: Any, tensors: Mapping[str, np.ndarray]
) -> bool:
    try:
        return family.settle(arguments_to_config(raw, family), tensors.get) == config
    except (ConfigError, ModelError):
        return False
