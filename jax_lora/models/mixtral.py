"""Mixtral: Mistral's attention, and in every layer experts in place of one feed-forward part.

Reference:
    Jiang et al. (arXiv:2401.04088), section 2.
"""

from __future__ import annotations

import dataclasses

from jax_lora.models.attention import Attention
from jax_lora.models.decoder import Decoder, DecoderLayer
from jax_lora.models.decoder_blocks import PreNormLayer
from jax_lora.models.experts import SparseMLP, sparse_layout
from jax_lora.models.family import ROTARY_TABLES, Family, decoder_json
from jax_lora.models.layout import Layout
from jax_lora.models.norms import RMSNorm
from jax_lora.models.windows import WindowConfig

__all__ = ["Mixtral", "MixtralConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(WindowConfig):
    """Sizes and switches of a Mixtral, named as in Hugging Face's `MixtralConfig`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, more experts
        chosen than there are, an activation or a rotary scaling that is not implemented.

    Example:
      >>> MixtralConfig().num_local_experts
      8
    """

    intermediate_size: int = 14336
    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    def __post_init__(self) -> None:  # noqa: D105  fills in what is derived, then checks
        super().__post_init__()
        self.check_sizes(("num_local_experts", "num_experts_per_tok"))
        if self.num_experts_per_tok > self.num_local_experts:
            expected = f"at most the {self.num_local_experts} experts there are"
            fix = "choose fewer experts for each token."
            self.refuse("num_experts_per_tok", self.num_experts_per_tok, expected, fix)


class MixtralLayer(PreNormLayer):
    """Attention, then the experts, each on a normed copy of x."""

    config: MixtralConfig

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.input_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.attn = Attention(c, dtype)
        self.post_attention_norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        self.mlp = SparseMLP(
            c,
            dtype,
            experts=c.num_local_experts,
            chosen=c.num_experts_per_tok,
            width=c.intermediate_size,
            normalised=True,
        )


class Mixtral(Decoder):
    """Mixtral decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = MixtralConfig(vocab_size=16, hidden_size=8, intermediate_size=6,
      ...                        num_hidden_layers=2, num_attention_heads=2,
      ...                        num_key_value_heads=1, num_local_experts=4)
      >>> model, ids = Mixtral(config), jnp.array([[3, 1, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
      >>> params["layers"]["mlp"]["experts"]["gate_up_proj"].shape
      (2, 4, 8, 12)
    """

    def layer_class(self) -> type[DecoderLayer]:
        """Mixtral's layer."""
        return MixtralLayer

    def layout(self) -> Layout:
        """Where a Mixtral's parameters stand in its files."""
        experts = sparse_layout("block_sparse_moe", gate="w1", up="w3", down="w2")
        return self.usual_layout(mlp=()) | experts


FAMILY = Family(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    config=MixtralConfig,
    module=Mixtral,
    to_json=decoder_json,
    redundant=ROTARY_TABLES,
)
