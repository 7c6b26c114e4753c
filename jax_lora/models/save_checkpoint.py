"""Write parameters as a Hugging Face folder that `transformers` loads."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jax_lora.errors import StructureError, explain
from jax_lora.models.hf_names import tensor_names
from jax_lora.models.llama import Llama, parameter_shapes
from jax_lora.models.llama_config import LlamaConfig

__all__ = ["save"]


def save(path: str | os.PathLike[str], model: Llama, params: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors`, in the parameters' own dtype.

    Use it for a base model or for merged parameters; adapters have their own formats.

    Args:
      path: folder, made if absent; files of the same names are replaced.
      model: the module the parameters belong to.
      params: as `model.init` or `load` gives them, without the "params" level.

    Raises:
      StructureError: if the parameters are not exactly the model's; nothing is written then.
    """
    flat = flatten_dict(dict(params), sep="/")
    _check(model, flat)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _unstacked(model.config, flat)
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    text = json.dumps(_config_json(model.config, dtype), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # the writer makes a private file; config.json is not private either


def _check(model: Llama, flat: Mapping[str, Any]) -> None:
    expected = parameter_shapes(model)
    problems = [f"missing: {path} {expected[path]}" for path in expected if path not in flat]
    for path, leaf in flat.items():
        shape = getattr(leaf, "shape", None)
        if path not in expected:
            problems.append(f"extra: {path} {shape}")
        elif not isinstance(leaf, jax.Array | np.ndarray):
            problems.append(f"no array: {path} is {type(leaf).__name__}")
        elif shape != expected[path]:
            problems.append(f"wrong shape: {path} is {shape}, expected {expected[path]}")
    if problems:
        raise StructureError(
            explain(
                "params",
                got="leaves that do not fit the model:\n    " + "\n    ".join(problems),
                expected="exactly the model's parameters, as plain arrays",
                fix="pass params without the 'params' level; merge an adapter into them first.",
            )
        )


def _unstacked(config: LlamaConfig, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    tensors = {}
    for path, name in tensor_names(config).items():
        leaf = np.asarray(flat[path])
        if path.endswith("/kernel"):
            leaf = leaf.swapaxes(-1, -2)  # torch keeps (out, in)
        if "{layer}" not in name:
            tensors[name] = np.ascontiguousarray(leaf)
            continue
        for layer in range(config.num_hidden_layers):
            tensors[name.format(layer=layer)] = np.ascontiguousarray(leaf[layer])
    return tensors


def _config_json(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    scaling = dict(config.rope_scaling or {})
    rope = {**scaling, "rope_type": config.rope_type, "rope_theta": config.rope_theta}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        # Transformers 5 reads rope_parameters, its elders the two older fields.
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": {**scaling, "rope_type": config.rope_type} if scaling else None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
