"""Load and save adapters of mlx-lm.

    adapter_config.json    {"fine_tune_type": "lora", "num_layers": N, "lora_parameters": {...}}
    adapters.safetensors   <module>.lora_a (in, r), <module>.lora_b (r, out)

The update is `scale * (x @ lora_a) @ lora_b`, with one scale for the whole adapter.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter
from jax_lora.errors import AdapterFileError
from jax_lora.kernels.kernel import Kernel
from jax_lora.peft.adapter_config import CONFIG, DEFAULTS, DROPOUT, RANK
from jax_lora.peft.factors import Factors, unsupported
from jax_lora.peft.hf_modules import Site, find_leaves, sites_of
from jax_lora.peft.named_factors import assemble_factors, read_factors
from jax_lora.peft.save import split_adapter
from jax_lora.peft.tensor_file import read_tensors, restore_files, write_files
from jax_lora.storage import schema
from jax_lora.storage.json_files import read_json
from jax_lora.storage.safe_paths import given_path

WEIGHTS = "adapters.safetensors"
_LAYER = re.compile(r"layers\.\d+\.(.*)")
_SETTINGS = schema.fields(
    {
        "lora_parameters": schema.fields(
            {
                "rank": RANK,
                "scale": schema.NUMBER,
                "dropout": DROPOUT,
            }
        )
    },
    required=("lora_parameters",),
)


def save_mlx(path: str | os.PathLike[str], adapter: Adapter, *, names: Mapping[str, str]) -> None:
    """Save an adapter to a folder for the option `--adapter-path` of mlx-lm.

    mlx-lm has a single scale, so differences between scales are multiplied into `lora_b`.

    Args:
      path: The folder, created if necessary.
      adapter: The adapter.
      names: Path of each kernel -> name of its module: `model.hf_names`.

    Raises:
      AdapterFileError: The adapter has fully trained leaves, magnitudes, biases, experts, different
        ranks or layers without an update, or the folder cannot be written.
      StructureError: `names` does not have a leaf of the adapter.
    """
    _, sites, found = split_adapter(adapter, names)
    problems = [*unsupported(adapter, found, sites), *_uneven(found, sites)]
    if problems:
        fix = "Merge it into the model with jl.merge, or export it with jl.peft.save."
        expected = "LoRA factors of equal rank in every layer"
        raise AdapterFileError("save_mlx", got=problems, expected=expected, fix=fix)
    scales = {each.scale for each in found.values()}
    scale = max(scales)
    tensors = {}
    for module, each in found.items():
        b = each.b if len(scales) == 1 else each.b * np.float32(each.scale / scale)
        tensors |= {f"{module}.lora_a": each.a, f"{module}.lora_b": b.astype(each.b.dtype)}
    text = json.dumps(_config(adapter, found, scale), indent=4, sort_keys=True)
    write_files(path, WEIGHTS, tensors, text)


def _uneven(found: Mapping[str, Factors], sites: Mapping[str, Site]) -> Iterator[str]:
    yield from (f"{module}: no update in this layer" for module in sites if module not in found)
    ranks = {each.rank for each in found.values()}
    if len(ranks) > 1:
        yield f"ranks {sorted(ranks)}: mlx-lm supports only one rank"


def _config(adapter: Adapter, found: Mapping[str, Factors], scale: float) -> dict[str, Any]:
    within = [match[1] for module in found if (match := _LAYER.search(module))]
    depth = {module for module in found if module.endswith(within[0])} if within else set()
    return {
        "fine_tune_type": "lora",
        "num_layers": len(depth),
        "lora_parameters": {
            "rank": next(iter(found.values())).rank,
            "scale": scale,
            "dropout": adapter.config.dropout,
            "keys": sorted(set(within)),
        },
    }


def load_mlx(
    path: str | os.PathLike[str],
    variables: Any,
    *,
    names: Mapping[str, str],
    kernels: Mapping[str, Kernel] | None = None,
    dtype: Any = jnp.float32,
) -> Adapter:
    """Load an adapter of mlx-lm.

    Args:
      path: Folder with `adapter_config.json` and `adapters.safetensors`.
      variables: The base parameters, or `{"params": parameters}`.
      names: Path of each kernel -> name of its module: `model.hf_names`.
      kernels: The result of `find_kernels`, for other axes than the stack and (in, out).
      dtype: Type of the factors; None for the type of the file.

    Returns:
      The adapter.

    Raises:
      AdapterFileError: The files are damaged, are not of type "lora", or do not fit the base model.
        One message lists all problems.
    """
    folder = given_path(path, AdapterFileError)
    restore_files(folder, WEIGHTS)
    tensors = read_tensors(folder, WEIGHTS)
    settings = read_json(folder / CONFIG, AdapterFileError, "config_bytes")
    sites = sites_of(find_leaves(variables, names, kernels))
    found, problems = read_factors(tensors, sites, ("lora_a", "lora_b"))
    problems = [*schema.problems(settings, _SETTINGS), *problems]
    if (kind := settings.get("fine_tune_type", "lora")) != "lora":
        problems.insert(0, f"fine_tune_type {schema.shown(kind)}: only 'lora' is implemented")
    if problems:
        fix = "Load the base model that the adapter was trained on, and pass its names."
        expected = "a LoRA adapter for this base model"
        raise AdapterFileError(folder, got=problems, expected=expected, fix=fix)
    parameters = settings["lora_parameters"]
    rank, dropout = parameters.get("rank", 8), parameters.get("dropout", 0.0)
    config = {**DEFAULTS, "r": rank, "lora_dropout": dropout}
    scale = float(parameters.get("scale", 20.0))
    return assemble_factors(found, sites, lambda rank: scale, config, dtype)
