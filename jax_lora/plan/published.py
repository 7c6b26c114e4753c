"""Fields of the `config.json` files of published models that determine their shapes."""

from __future__ import annotations

from typing import Any

_LLAMA_2 = {
    "model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA_3 = {
    "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192,
    "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
_MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
_QWEN_3 = {
    "model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40960,
    "num_key_value_heads": 8, "vocab_size": 151936,
}  # fmt: skip
_GEMMA_2 = {
    "model_type": "gemma2", "head_dim": 256, "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "vocab_size": 256000,
}  # fmt: skip
_GPT_2 = {"model_type": "gpt2", "n_positions": 1024, "vocab_size": 50257}
_ROBERTA = {
    "model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1,
    "vocab_size": 50265, "pad_token_id": 1,
}  # fmt: skip
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip


def _sizes(*sizes: int) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=False))


PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": _GPT_2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": _GPT_2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": _GPT_2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": _GPT_2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "llama-2-7b": _LLAMA_2 | _sizes(4096, 11008, 32, 32, 32),
    "llama-2-13b": _LLAMA_2 | _sizes(5120, 13824, 40, 40, 40),
    "llama-2-70b": _LLAMA_2 | _sizes(8192, 28672, 80, 64, 8),
    "llama-3-8b": _LLAMA_3 | _sizes(4096, 14336, 32, 32),
    "llama-3-70b": _LLAMA_3 | _sizes(8192, 28672, 80, 64),
    "llama-3.1-405b": _LLAMA_3 | _sizes(16384, 53248, 126, 128),
    "llama-3.2-1b": _LLAMA_3 | _sizes(2048, 8192, 16, 32) | {"tie_word_embeddings": True},
    "llama-3.2-3b": _LLAMA_3 | _sizes(3072, 8192, 28, 24) | {"tie_word_embeddings": True},
    "mistral-7b": _MISTRAL,
    "mixtral-8x7b": _MISTRAL
    | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3-0.6b": _QWEN_3 | _sizes(1024, 3072, 28, 16) | {"tie_word_embeddings": True},
    "qwen3-8b": _QWEN_3 | _sizes(4096, 12288, 36, 32) | {"tie_word_embeddings": False},
    "gemma-2-2b": _GEMMA_2 | _sizes(2304, 9216, 26, 8, 4),
    "gemma-2-9b": _GEMMA_2 | _sizes(3584, 14336, 42, 16, 8),
    "gemma-3-4b": {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}
    | _sizes(2560, 10240, 34)},
    "smollm3-3b": {"model_type": "smollm3", "max_position_embeddings": 65536}
    | _sizes(2048, 11008, 36, 16, 4),
    "olmo-2-7b": {"model_type": "olmo2", "vocab_size": 100352, "max_position_embeddings": 4096},
    "granite-3.3-8b": {
        "model_type": "granite", "vocab_size": 49159, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    } | _sizes(4096, 12800, 40, 32, 8),
    "seed-oss-36b": {"model_type": "seed_oss", "hidden_size": 5120},
    "roberta-base": _ROBERTA | _sizes(768, 3072, 12, 12),
    "roberta-large": _ROBERTA | _sizes(1024, 4096, 24, 16),
}  # fmt: skip

# Brown et al. (arXiv:2005.14165), table 2.1. GPT-3 is not public; `planned_model` has its kernels.
GPT3 = "gpt3-175b"
GPT3_CONFIG = {
    "hidden_size": 12288, "intermediate_size": 4 * 12288, "num_hidden_layers": 96,
    "num_attention_heads": 96, "max_position_embeddings": 2048, "vocab_size": 50257,
}  # fmt: skip

NAMES = (*PUBLISHED, GPT3)
