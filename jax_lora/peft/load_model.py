"""Load a PEFT adapter, and change the base model to the model that it was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jax_lora.adapter import Adapter
from jax_lora.peft.load import assemble, read_files


def load_model(
    path: str | os.PathLike[str],
    model: Any,
    params: Mapping[str, Any],
    *,
    dtype: Any = jnp.float32,
) -> tuple[Any, Any, Adapter]:
    """Load a PEFT adapter, and change the base model to the model that it was trained on.

    Use it instead of `load` for a model of `jax_lora.models`. It repeats layers according to
    `layer_replication`, resizes the vocabulary to the size of the tables in the file, and unties
    the output head if the adapter changes only one end of a tied embedding. Embeddings of added
    tokens are those of the file if it has them, else the mean embedding. If no change is necessary,
    model and parameters are returned unchanged.

    Pass the unchanged base model. To load a second adapter for the changed model, use `load`: this
    function would repeat the layers again.

    Args:
      path: Folder with `adapter_config.json` and `adapter_model.safetensors`, or a name on the
        Hugging Face Hub as a string, `"owner/name"` or `"owner/name@revision"`.
      model: The base model, from `jl.models.load`.
      params: Its parameters, or `{"params": parameters}`; arrays, with kernels of shape
        (layers, in, out).
      dtype: Type of the factors; None for the type of the file.

    Returns:
      The model, its parameters in the form of `params`, and the adapter. Continue with
      `combine(params, adapter)` or `save(path, adapter, names=model.hf_names)`.

    Raises:
      AdapterFileError: The files are damaged, need an unimplemented feature, or do not fit the
        changed model.
      ModelError: `model` is not from `jax_lora.models`, or does not support the change.
      HubError: The name cannot be found or downloaded.

    Warns:
      AdapterFileWarning: The configuration has unknown fields.

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
    files = read_files(path)
    # Imports Flax modules, which `load` does not need.
    from jax_lora.peft.changed_model import changed_model

    wrapped = set(params) == {"params"}
    base = params["params"] if wrapped else params
    model, changed = changed_model(model, base, files.tensors, files.config)
    if changed is not base:
        params = {"params": changed} if wrapped else changed
    return model, params, assemble(files, params, names=model.hf_names, dtype=dtype)
