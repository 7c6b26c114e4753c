"""The Llama family's configuration, in the terms of Hugging Face's `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["LlamaConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and switches of a Llama decoder, named as in Hugging Face's `LlamaConfig`.

    Use it to build a fresh `Llama`; `jax_lora.models.load` fills one from a checkpoint's
    `config.json`.

    Example:
      >>> LlamaConfig(hidden_size=64, num_attention_heads=4).head_dim
      16
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads (no grouping)
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # {"rope_type": "linear", "factor": 2.0, ...}
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)

    @property
    def rope_type(self) -> str:
        """Name of the rotary scaling: default, linear, dynamic, yarn or llama3."""
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type") or scaling.get("type") or "default"
