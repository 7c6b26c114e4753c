"""Published models by name, as far as their shapes go: the sizes of their `config.json`."""

from __future__ import annotations

from typing import Any

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
_LLAMA_2 = _LLAMA | {
    "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA_3 = _LLAMA | {
    "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
_MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
_QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128,
    "max_position_embeddings": 40960, "num_key_value_heads": 8, "rope_theta": 1000000,
    "vocab_size": 151936,
}  # fmt: skip
_GEMMA_2 = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
_GPT_2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": 1024,
    "vocab_size": 50257, "activation_function": "gelu_new",
}  # fmt: skip
_ROBERTA = {
    "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "hidden_act": "gelu",
    "layer_norm_eps": 1e-5, "max_position_embeddings": 514, "type_vocab_size": 1,
    "vocab_size": 50265, "pad_token_id": 1,
}  # fmt: skip


def _sizes(hidden: int, inner: int, layers: int, heads: int, groups: int = 0) -> dict[str, Any]:
    sizes = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }  # fmt: skip
    return sizes | ({"num_key_value_heads": groups} if groups else {})


def _gpt_2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return _GPT_2 | {"n_embd": width, "n_layer": layers, "n_head": heads}


PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": _gpt_2(768, 12, 12),
    "gpt2-medium": _gpt_2(1024, 24, 16),
    "gpt2-large": _gpt_2(1280, 36, 20),
    "gpt2-xl": _gpt_2(1600, 48, 25),
    "llama-2-7b": _LLAMA_2 | _sizes(4096, 11008, 32, 32, 32),
    "llama-2-13b": _LLAMA_2 | _sizes(5120, 13824, 40, 40, 40),
    "llama-2-70b": _LLAMA_2 | _sizes(8192, 28672, 80, 64, 8),
    "llama-3-8b": _LLAMA_3 | _sizes(4096, 14336, 32, 32),
    "llama-3-70b": _LLAMA_3 | _sizes(8192, 28672, 80, 64),
    "llama-3.2-1b": _LLAMA_3 | _sizes(2048, 8192, 16, 32) | {"tie_word_embeddings": True},
    "mistral-7b": _MISTRAL,
    "mixtral-8x7b": _MISTRAL
    | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1000000.0,
    },
    "qwen3-0.6b": _QWEN_3 | _sizes(1024, 3072, 28, 16) | {"tie_word_embeddings": True},
    "qwen3-8b": _QWEN_3 | _sizes(4096, 12288, 36, 32) | {"tie_word_embeddings": False},
    "gemma-2-2b": _GEMMA_2 | _sizes(2304, 9216, 26, 8, 4),
    "gemma-2-9b": _GEMMA_2 | _sizes(3584, 14336, 42, 16, 8),
    "roberta-base": _ROBERTA | _sizes(768, 3072, 12, 12),
    "roberta-large": _ROBERTA | _sizes(1024, 4096, 24, 16),
}  # fmt: skip

# Brown et al. (arXiv:2005.14165), table 2.1. No file of it was ever published, and the LoRA paper
# adapts queries and values apart, so its kernels are written down in `gpt3`.
GPT3 = "gpt3-175b"
GPT3_SIZES = {"width": 12288, "layers": 96, "heads": 96, "positions": 2048, "vocabulary": 50257}

NAMES = (*PUBLISHED, GPT3)
