"""Load a PEFT adapter together with the model that it was trained on, made of its base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jax_lora.adapter import Adapter
from jax_lora.peft.adapter_config import read_config
from jax_lora.peft.load import WEIGHTS, assemble
from jax_lora.peft.tensor_file import read_tensors


def load_model(
    path: str | os.PathLike[str],
    model: Any,
    params: Mapping[str, Any],
    *,
    dtype: Any = jnp.float32,
) -> tuple[Any, Any, Adapter]:
    """Load a PEFT adapter, and change the model into the one that the adapter was trained on.

    Use it in place of `load` for a model of `jax_lora.models`. It repeats the layers that
    `layer_replication` names, resizes the vocabulary to that of the tables in the file, and unties
    the output head where the adapter changes one end of a tied embedding. Embeddings of added
    tokens are the file's where it has the base's own; otherwise they are the mean of the others.
    An adapter that fits the base leaves model and parameters as they are.

    Pass the base as it was loaded. A second adapter for the changed model is loaded with `load`:
    here its layers would be repeated again.

    Args:
      path: Folder with `adapter_config.json` and `adapter_model.safetensors`.
      model: The base, as `jl.models.load` returned it.
      params: Its parameters, (layers, in, out) for each kernel in a layer, or
        `{"params": parameters}`; arrays.
      dtype: Type of the factors; None keeps the file's.

    Returns:
      The model, its parameters in the form that they were passed in, and the adapter: all that
      `combine(params, adapter)` and `save(path, adapter, names=model.hf_names)` need.

    Raises:
      AdapterFileError: The files are broken, ask for what is not implemented, or do not fit the
        changed model either.
      ModelError: `model` is not a model of `jax_lora.models`, or cannot be changed so.

    Warns:
      AdapterFileWarning: The configuration has fields that are not known here.

    Example:
      >>> import tempfile, jax, jax_lora as jl
      >>> from jax_lora.bundled import model_path
      >>> model, params = jl.models.load(model_path())
      >>> untied, more = jl.models.untie(model, params)
      >>> config = jl.LoraConfig(rank=2, targets=["lm_head"])
      >>> adapter = jl.lora_init(jax.random.key(0), {"lm_head": more["lm_head"]}, config)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jl.peft.save(folder, adapter, names=untied.hf_names)
      ...     model, params, adapter = jl.peft.load_model(folder, model, params)
      >>> model.config.tie_word_embeddings, list(adapter.pairs)
      (False, ['lm_head/kernel'])
    """
    folder = Path(path)
    tensors, config = read_tensors(folder, WEIGHTS), read_config(folder)
    # Models import Flax's modules, which adapters of other models do without.
    from jax_lora.peft.changed_model import changed_model

    wrapped = set(params) == {"params"}
    base = params["params"] if wrapped else params
    model, changed = changed_model(model, base, tensors, config)
    if changed is not base:
        params = {"params": changed} if wrapped else changed
    adapter = assemble(folder, tensors, config, params, names=model.hf_names, dtype=dtype)
    return model, params, adapter
