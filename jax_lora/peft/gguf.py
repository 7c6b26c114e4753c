"""Write an adapter for llama.cpp, as a GGUF file.

    general.architecture         the architecture of the base model, in llama.cpp's words
    general.type, adapter.type   "adapter", "lora"
    adapter.lora.alpha           alpha; the scale of a tensor is alpha / its rank
    <tensor>.lora_a              (r, in); experts (experts, r, in); table (vocabulary, r)
    <tensor>.lora_b              (out, r); experts (experts, out, r)

`<tensor>` is llama.cpp's name of the base weight, such as `blk.0.attn_q.weight`.

Reference:
  In the repository of llama.cpp: `src/llama-adapter.cpp`, which reads the file, and
  `gguf-py/gguf/tensor_mapping.py`, which has the names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jax_lora.adapter import Adapter
from jax_lora.errors import AdapterFileError, ConfigError
from jax_lora.peft.factors import Factors, unsupported
from jax_lora.peft.hf_modules import Site
from jax_lora.peft.save import split_adapter
from jax_lora.peft.tensor_file import check_finite
from jax_lora.peft.tied import tied_table
from jax_lora.storage.atomic_writes import made_folder, replacing
from jax_lora.storage.gguf_file import write_gguf
from jax_lora.storage.locks import locked
from jax_lora.storage.safe_paths import given_path

GGUF = "adapter.gguf"
# model_type in config.json -> llama.cpp's architecture.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
    "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip
# Module -> llama.cpp's tensors: of a layer by the end of the name, other modules by the whole name.
# The outputs of a module with two tensors are divided between them.
_TENSORS: dict[str, tuple[str, ...]] = {
    "model.embed_tokens": ("token_embd",),
    "lm_head": ("output",),
    "self_attn.q_proj": ("attn_q",),
    "self_attn.k_proj": ("attn_k",),
    "self_attn.v_proj": ("attn_v",),
    "self_attn.qkv_proj": ("attn_qkv",),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_proj": ("ffn_gate",),
    "mlp.up_proj": ("ffn_up",),
    "mlp.gate_up_proj": ("ffn_up",),
    "mlp.down_proj": ("ffn_down",),
    "mlp.gate.weight": ("ffn_gate_inp",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
    "transformer.wte": ("token_embd",),
    "attn.c_attn": ("attn_qkv",),
    "attn.c_proj": ("attn_output",),
    "mlp.c_fc": ("ffn_up",),
    "mlp.c_proj": ("ffn_down",),
}
_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.*)")
# llama.cpp rotates neighboring channels in this architecture, so its files have the rows of queries
# and keys in another order. In all others it rotates the halves of a head, as transformers does.
_REORDERED = "llama"


def save_gguf(path: str | os.PathLike[str], adapter: Adapter, *, model: Any) -> None:
    """Save an adapter to `adapter.gguf` in a folder, for the option `--lora` of llama.cpp.

    Use it with the base model that llama.cpp's `convert_hf_to_gguf.py` converts from the same
    Hugging Face folder. The factors are stored in float32. llama.cpp has a single alpha, so
    differences between alphas are multiplied into `lora_b`.

    Args:
      path: The folder, created if necessary. An adapter in it is replaced atomically.
      adapter: The adapter.
      model: The base model, of `jax_lora.models`.

    Raises:
      AdapterFileError: The adapter has fully trained leaves, trained rows, magnitudes, biases or an
        update of a tied table; a factor has NaN or Inf; or the folder cannot be written.
      ConfigError: llama.cpp's name of the architecture is not in `ARCHITECTURES`.
      StructureError: The model does not have a leaf of the adapter.
    """
    kind = _architecture(model)
    _, sites, found = split_adapter(adapter, model.hf_names)
    problems = [*unsupported(adapter, found, sites, parameters=True), *_unnamed(found, model)]
    if problems:
        expected = "LoRA factors of weights that llama.cpp can adapt"
        fix = "Merge the adapter instead: jax-lora fuse, which prints how to convert the folder."
        raise AdapterFileError("save_gguf", got=problems, expected=expected, fix=fix)
    # The reader computes alpha / r; 0 would mean a scale of 1.
    alpha = max((abs(each.scale * each.rank) for each in found.values()), default=0.0) or 1.0
    tensors: dict[str, np.ndarray] = {}
    for module, each in found.items():
        factors = _with_alpha(each, alpha)
        if kind == _REORDERED:
            factors = _reordered(module, factors, model.config)
        tensors |= _tensors_of(module, factors, sites[module])
    folder = given_path(path, AdapterFileError)
    check_finite(folder, tensors)
    metadata = {"general.architecture": kind, "general.type": "adapter", "adapter.type": "lora"}
    with made_folder(folder, AdapterFileError), locked(folder, AdapterFileError):
        with replacing(folder / GGUF, AdapterFileError) as part:
            write_gguf(part, {**metadata, "adapter.lora.alpha": alpha}, tensors)


def _architecture(model: Any) -> str:
    from jax_lora.models.families import family_of  # adapters of other models do not need them

    kind = family_of(model).model_type
    if kind not in ARCHITECTURES:
        raise ConfigError(
            "save_gguf",
            got=f"a model of type {kind}",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            fix="Save it for PEFT with jl.peft.save.",
        )
    return ARCHITECTURES[kind]


def _unnamed(found: Mapping[str, Factors], model: Any) -> Iterator[str]:
    tied = tied_table(model.hf_names)
    for module in found:
        if not _tensor_names(module):
            yield f"{module}: llama.cpp does not adapt this weight"
        elif module == tied:
            yield f"{module}: also the output head, but llama.cpp adapts only the lookup"


def _tensor_names(module: str) -> list[str]:
    """Return llama.cpp's names of the weights of a module; none if it does not adapt them.

    Example:
      >>> _tensor_names("model.layers.3.self_attn.q_proj")
      ['blk.3.attn_q.weight']
    """
    match = _LAYER.fullmatch(module)
    stem, rest = (f"blk.{match[1]}.", match[2]) if match else ("", module)
    return [f"{stem}{name}.weight" for name in _TENSORS.get(rest, ())]


def _with_alpha(factors: Factors, alpha: float) -> Factors:
    """Return factors in float32 whose scale is alpha / r."""
    ratio = np.float32(factors.scale * factors.rank / alpha)
    a, b = factors.a.astype(np.float32), factors.b.astype(np.float32) * ratio
    return Factors(a, b, alpha / factors.rank)


def _reordered(module: str, factors: Factors, config: Any) -> Factors:
    """Put channel i of a head's second half behind channel i of its first half."""
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads = counts.get(module.split(".")[-1])
    if heads is None:
        return factors
    halves = factors.b.reshape(factors.rank, heads, 2, -1)
    return Factors(factors.a, halves.swapaxes(2, 3).reshape(factors.b.shape), factors.scale)


def _tensors_of(module: str, factors: Factors, site: Site) -> dict[str, np.ndarray]:
    names = _tensor_names(module)
    a = factors.a if site.leaf.is_table else factors.a.swapaxes(-1, -2)
    parts = np.split(factors.b.swapaxes(-1, -2), len(names), axis=-2)
    return {
        f"{name}.{factor}": tensor
        for name, part in zip(names, parts, strict=True)
        for factor, tensor in (("lora_a", a), ("lora_b", part))
    }
