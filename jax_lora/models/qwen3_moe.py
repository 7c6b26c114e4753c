"""Qwen3-MoE: Qwen3's attention, and in every layer experts in place of one feed-forward part.

Models that mix dense layers with layers of experts are refused.

Reference:
    Yang et al. (arXiv:2505.09388), section 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_lora.models.attention import Attention
from jax_lora.models.decoder import Decoder, DecoderLayer
from jax_lora.models.decoder_blocks import QK_NORM_NAMES, PreNormLayer
from jax_lora.models.experts import SparseMLP, sparse_layout
from jax_lora.models.family import ROTARY_TABLES, Family, decoder_json, nullable
from jax_lora.models.layout import Layout
from jax_lora.models.norms import RMSNorm
from jax_lora.models.windows import WindowConfig

__all__ = ["Qwen3MoE", "Qwen3MoEConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoEConfig(WindowConfig):
    """Sizes and switches of a Qwen3-MoE, named as in Hugging Face's `Qwen3MoeConfig`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, more experts
        chosen than there are, layers without experts, an activation or a rotary scaling that is
        not implemented.

    Example:
      >>> Qwen3MoEConfig(num_experts=16).moe_intermediate_size
      768
    """

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144  # of layers without experts, of which there are none
    num_hidden_layers: int = 24
    num_key_value_heads: int = 4
    max_position_embeddings: int = 32768
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096  # of no effect without use_sliding_window
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:  # noqa: D105  fills in what is derived, then checks
        super().__post_init__()
        self.check_sizes(("moe_intermediate_size", "num_experts", "num_experts_per_tok"))
        self.check_choice("decoder_sparse_step", (1,))
        dense_layers = set(self.mlp_only_layers) & set(range(self.num_hidden_layers))
        if dense_layers:
            fix = "layers without experts are not implemented."
            self.refuse("mlp_only_layers", self.mlp_only_layers, "none of the layers", fix)
        if self.num_experts_per_tok > self.num_experts:
            expected = f"at most the {self.num_experts} experts there are"
            fix = "choose fewer experts for each token."
            self.refuse("num_experts_per_tok", self.num_experts_per_tok, expected, fix)

    @property
    def window(self) -> int | None:
        """How many tokens back all layers see, each token itself included."""
        return self.sliding_window if self.use_sliding_window else None


class Qwen3MoELayer(PreNormLayer):
    """Attention, then the experts, each on a normed copy of x."""

    config: Qwen3MoEConfig

    norm_names = PreNormLayer.norm_names | QK_NORM_NAMES

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.input_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.attn = Attention(
            c,
            dtype,
            bias=c.attention_bias,
            out_bias=c.attention_bias,
            qk_norm=RMSNorm(c.rms_norm_eps, param_dtype=dtype, parent=None),
        )
        self.post_attention_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.mlp = SparseMLP(
            c,
            dtype,
            experts=c.num_experts,
            chosen=c.num_experts_per_tok,
            width=c.moe_intermediate_size,
            normalised=c.norm_topk_prob,
        )


class Qwen3MoE(Decoder):
    """Qwen3-MoE decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = Qwen3MoEConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2,
      ...                         num_attention_heads=2, num_key_value_heads=1, num_experts=4,
      ...                         moe_intermediate_size=6, num_experts_per_tok=2)
      >>> model, ids = Qwen3MoE(config), jnp.array([[3, 1, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
      >>> params["layers"]["mlp"]["experts"]["down_proj"].shape
      (2, 4, 6, 8)
    """

    def layer_class(self) -> type[DecoderLayer]:
        """Qwen3-MoE's layer."""
        return Qwen3MoELayer

    def layout(self) -> Layout:
        """Where a Qwen3-MoE's parameters stand in its files."""
        experts = sparse_layout("mlp", gate="gate_proj", up="up_proj", down="down_proj")
        return self.usual_layout(mlp=()) | experts


def _fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 says `num_local_experts` where its elders say `num_experts`."""
    found = nullable("sliding_window")(raw)
    experts = raw.get("num_local_experts") or raw.get("num_experts")
    return found | ({"num_experts": experts} if experts is not None else {})


def _to_json(config: Qwen3MoEConfig) -> dict[str, Any]:
    return {**decoder_json(config), "num_local_experts": config.num_experts}


FAMILY = Family(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    config=Qwen3MoEConfig,
    module=Qwen3MoE,
    to_json=_to_json,
    fields=_fields,
    harmless=("num_local_experts", "max_window_layers"),
    redundant=ROTARY_TABLES,
)
