"""The Llama-like architectures, one entry each.

An entry has three parts: a configuration with the fields and defaults of its `config.json`, a class
with its `DecoderDesign`, and a row of the table `DECODERS`. To add an architecture, write an entry
and export its two classes in `jax_lora/models/__init__.py`.

All classes have the attributes of `CheckpointModel` and the arguments of
`CausalDecoder.__call__`::

    model = Llama(LlamaConfig(num_hidden_layers=2))
    params = model.init(jax.random.key(0), input_ids)["params"]
    logits = model.apply({"params": params}, input_ids, attention_mask=mask)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_lora.models.decoder import Decoder, DecoderDesign
from jax_lora.models.decoder_config import (
    FULL,
    SLIDING,
    DecoderConfig,
    ExpertSizes,
    LayerKind,
    MixedLayersConfig,
    WindowConfig,
    frozen_settings,
)
from jax_lora.models.decoder_json import (
    decoder_json,
    gemma3_fields,
    gemma3_json,
    phi3_fields,
    phi3_json,
    qwen3_moe_fields,
    qwen3_moe_json,
)
from jax_lora.models.experts import ExpertNames
from jax_lora.models.family import Family, nullable
from jax_lora.models.model_config import is_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Configuration of a Llama, named as in Hugging Face's `LlamaConfig`."""

    attention_bias: bool = False
    mlp_bias: bool = False


class Llama(Decoder):
    """Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Reference:
      Touvron et al. (arXiv:2302.13971); Grattafiori et al., Llama 3 (arXiv:2407.21783).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                      num_hidden_layers=2, num_attention_heads=2)
      >>> model, ids = Llama(config), jnp.array([[3, 1, 4]])
      >>> params = model.init(jax.random.key(0), ids)["params"]
      >>> params["layers"]["attn"]["q_proj"]["kernel"].shape
      (2, 8, 8)
      >>> model.apply({"params": params}, ids).shape
      (1, 3, 16)
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(WindowConfig):
    """Configuration of a Mistral, named as in Hugging Face's `MistralConfig`.

    Example:
      >>> MistralConfig(sliding_window=None).window  # as later versions of Mistral 7B
    """

    intermediate_size: int = 14336
    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096


class Mistral(Decoder):
    """Mistral: a Llama with sliding-window attention.

    Reference:
      Jiang et al. (arXiv:2310.06825), section 2.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(MistralConfig):
    """Configuration of a Mixtral, named as in Hugging Face's `MixtralConfig`."""

    sliding_window: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        super().__post_init__()
        self.check_sizes(("num_local_experts", "num_experts_per_tok"))
        _check_experts(self, self.num_local_experts)

    @property
    def experts(self) -> ExpertSizes:
        """Sizes of the mixture of experts."""
        count, per_token = self.num_local_experts, self.num_experts_per_tok
        return ExpertSizes(count, per_token, self.intermediate_size, normalized=True)


class Mixtral(Decoder):
    """Mixtral: a Mistral with a mixture of experts in every layer.

    Reference:
      Jiang et al. (arXiv:2401.04088), section 2.
    """

    design = DecoderDesign(experts=ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2"))


def _check_experts(config: Any, count: int) -> None:
    if config.num_experts_per_tok > count:
        expected, fix = f"at most the {count} experts of the model", "lower num_experts_per_tok."
        config.fail("num_experts_per_tok", expected, fix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(MixedLayersConfig):
    """Configuration of a Qwen2, named as in Hugging Face's `Qwen2Config`.

    Example:
      >>> config = Qwen2Config(num_hidden_layers=3, use_sliding_window=True, max_window_layers=2)
      >>> config.layer_types
      ('full_attention', 'full_attention', 'sliding_attention')
    """

    vocab_size: int = 151936
    intermediate_size: int = 22016
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28  # from this layer on, if `use_sliding_window`

    def default_layer_types(self) -> tuple[str, ...]:
        """Give the last layers a window if `use_sliding_window` is set."""
        full = self.num_hidden_layers if self.window is None else self.max_window_layers
        return tuple(FULL if i < full else SLIDING for i in range(self.num_hidden_layers))


class Qwen2(Decoder):
    """Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values.

    Reference:
      Yang et al. (arXiv:2407.10671), section 2.2.
    """

    design = DecoderDesign(qkv_bias=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """Configuration of a Qwen3, named as in Hugging Face's `Qwen3Config`."""

    head_dim: int = 128
    attention_bias: bool = False


class Qwen3(Decoder):
    """Qwen3: a Llama whose queries and keys are normalized before they are rotated.

    Reference:
      Yang et al. (arXiv:2505.09388), section 2.
    """

    design = DecoderDesign(qk_norm=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoEConfig(WindowConfig):
    """Configuration of a Qwen3-MoE, named as in Hugging Face's `Qwen3MoeConfig`.

    Models that mix dense layers with layers of experts are not implemented.
    """

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144  # of dense layers, so not used
    num_hidden_layers: int = 24
    num_key_value_heads: int = 4
    max_position_embeddings: int = 32768
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        super().__post_init__()
        self.check_sizes(("moe_intermediate_size", "num_experts", "num_experts_per_tok"))
        self.check_choice("decoder_sparse_step", (1,))
        if set(self.mlp_only_layers) & set(range(self.num_hidden_layers)):
            fix = "layers without experts are not implemented."
            self.fail("mlp_only_layers", "an empty list", fix)
        _check_experts(self, self.num_experts)

    @property
    def experts(self) -> ExpertSizes:
        """Sizes of the mixture of experts."""
        count, per_token = self.num_experts, self.num_experts_per_tok
        return ExpertSizes(count, per_token, self.moe_intermediate_size, self.norm_topk_prob)


class Qwen3MoE(Decoder):
    """Qwen3-MoE: a Qwen3 with a mixture of experts in every layer.

    Reference:
      Yang et al. (arXiv:2505.09388), section 2.
    """

    design = DecoderDesign(
        qk_norm=True,
        experts=ExpertNames("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(DecoderConfig):
    """Configuration of a Gemma, named as in Hugging Face's `GemmaConfig`.

    Example:
      >>> GemmaConfig(hidden_act="gelu").hidden_act  # the first files say "gelu" for the tanh form
      'gelu_pytorch_tanh'
    """

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        self.set_default("hidden_act", "gelu_pytorch_tanh", unset=("gelu",))
        super().__post_init__()


class Gemma(Decoder):
    """Gemma: norms by 1 + scale, embeddings multiplied by sqrt(hidden_size), GeGLU.

    Reference:
      Gemma Team (arXiv:2403.08295), section 2.
    """

    design = DecoderDesign(gemma_scales=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _MixedGemmaConfig(MixedLayersConfig):
    """The fields that Gemma 2 and Gemma 3 share."""

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"  # overrides hidden_act
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    final_logit_softcapping: float | None = None

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        self.set_field("hidden_act", self.hidden_activation)
        super().__post_init__()
        caps = ("final_logit_softcapping", "attn_logit_softcapping")
        given = [name for name in caps if getattr(self, name) is not None]
        self.check_positive(("query_pre_attn_scalar", *given))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(_MixedGemmaConfig):
    """Configuration of a Gemma 2, named as in Hugging Face's `Gemma2Config`.

    Example:
      >>> Gemma2Config(num_hidden_layers=3).layer_types
      ('sliding_attention', 'full_attention', 'sliding_attention')
    """

    vocab_size: int = 256000
    max_position_embeddings: int = 8192
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0

    def default_layer_types(self) -> tuple[str, ...]:
        """Alternate between layers with a window and without, the first with one."""
        return tuple(FULL if i % 2 else SLIDING for i in range(self.num_hidden_layers))


class Gemma2(Decoder):
    """Gemma 2: soft caps on scores and logits, norms around each block, mixed layers.

    Reference:
      Gemma Team (arXiv:2408.00118), section 2.
    """

    design = DecoderDesign(gemma_scales=True, sandwich=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(_MixedGemmaConfig):
    """Configuration of a Gemma 3 text model, named as in Hugging Face's `Gemma3TextConfig`.

    `rope_theta` and `rope_scaling` are those of the layers without a window.

    Example:
      >>> Gemma3Config(num_hidden_layers=4, sliding_window_pattern=2).layer_types
      ('sliding_attention', 'full_attention', 'sliding_attention', 'full_attention')
    """

    vocab_size: int = 262208
    max_position_embeddings: int = 131072
    rope_theta: float = 1e6
    rope_local_base_freq: float = 10000.0  # rope_theta of the layers with a window
    rope_local_scaling: Mapping[str, Any] | None = None
    sliding_window_pattern: int = 6  # every sixth layer has no window

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        if self.rope_local_scaling is not None:
            self.set_field("rope_local_scaling", frozen_settings(self.rope_local_scaling))
        self.check_sizes(("sliding_window_pattern",))
        super().__post_init__()
        self.check_positive(("rope_local_base_freq",))

    def default_layer_types(self) -> tuple[str, ...]:
        """Give all layers a window, except every `sliding_window_pattern`-th."""
        numbers = range(1, self.num_hidden_layers + 1)
        return tuple(SLIDING if i % self.sliding_window_pattern else FULL for i in numbers)

    @property
    def sliding_kind(self) -> LayerKind:
        """The kind of the layers with a window, which have other rotary settings."""
        local = {"rope_theta": self.rope_local_base_freq, "rope_scaling": self.rope_local_scaling}
        return LayerKind(self.window, dataclasses.replace(self, **local))


class Gemma3(Decoder):
    """Gemma 3, the text model: a Gemma 2 with normalized queries and keys instead of soft caps.

    Reference:
      Gemma Team (arXiv:2503.19786), section 2.
    """

    design = DecoderDesign(gemma_scales=True, sandwich=True, qk_norm=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(WindowConfig):
    """Configuration of a Phi-3, named as in Hugging Face's `Phi3Config`.

    Example:
      >>> Phi3Config(hidden_size=64, num_attention_heads=2, partial_rotary_factor=0.75).rotary_dim
      24
    """

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096  # the length longrope was trained with
    partial_rotary_factor: float = 1.0  # share of each head's channels that is rotated
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        if self.rope_scaling is not None:
            self._complete_scaling(dict(self.rope_scaling))
        self.check_sizes(("original_max_position_embeddings",))
        if not is_positive(self.partial_rotary_factor) or self.partial_rotary_factor > 1:
            expected = "a positive number, at most 1"
            self.fail("partial_rotary_factor", expected, "1.0 rotates all channels.")
        self.check_choice("rope_type", ("default", "longrope"))
        super().__post_init__()

    def _complete_scaling(self, scaling: dict[str, Any]) -> None:
        """Phi-3's files have other names for longrope, and some of its settings as fields."""
        kind, _ = self.rope_type, scaling.pop("type", None)
        scaling["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
        scaling["original_max_position_embeddings"] = self.original_max_position_embeddings
        factor = scaling.pop("partial_rotary_factor", self.partial_rotary_factor)
        self.set_field("partial_rotary_factor", factor)
        self.set_field("rope_scaling", scaling)

    @property
    def rotary_dim(self) -> int:
        """Number of channels of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


class Phi3(Decoder):
    """Phi-3 and Phi-4-mini: a Llama with fused kernels and longrope.

    With longrope, one call rotates all tokens by the short or by the long factors, depending on
    its longest position. Keys in a cache keep their rotation, so do not let one cache grow beyond
    the trained length.

    Reference:
      Abdin et al. (arXiv:2404.14219), section 2; Ding et al., LongRoPE (arXiv:2402.13753).
    """

    design = DecoderDesign(fused=True)


# -----------------------------------------------------------------------------------------------
# The table
# -----------------------------------------------------------------------------------------------

_WINDOW = "sliding_window"
_NO_BIDIRECTIONAL = {"use_bidirectional_attention": (None, False)}


def _row(
    model_type: str,
    architecture: str,
    config: Any,
    module: Any,
    to_json: Any = decoder_json,
    **more: Any,
) -> Family:
    """Make a row: a `Family` with the defaults of Llama-like decoders."""
    return Family(
        model_type=model_type,
        architectures=(architecture,),
        config=config,
        module=module,
        to_json=to_json,
        # Older files have tables of rotary frequencies.
        redundant=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        **more,
    )


DECODERS: tuple[Family, ...] = (
    _row("llama", "LlamaForCausalLM", LlamaConfig, Llama),
    _row("mistral", "MistralForCausalLM", MistralConfig, Mistral, fields=nullable(_WINDOW)),
    _row("mixtral", "MixtralForCausalLM", MixtralConfig, Mixtral),
    _row("qwen2", "Qwen2ForCausalLM", Qwen2Config, Qwen2, fields=nullable(_WINDOW)),
    _row("qwen3", "Qwen3ForCausalLM", Qwen3Config, Qwen3, fields=nullable(_WINDOW)),
    _row(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        Qwen3MoEConfig,
        Qwen3MoE,
        fields=qwen3_moe_fields,
        to_json=qwen3_moe_json,
        harmless=("num_local_experts", "max_window_layers"),
    ),
    _row(
        "gemma",
        "GemmaForCausalLM",
        GemmaConfig,
        Gemma,
        neutral={"hidden_activation": (None, "gelu_pytorch_tanh"), **_NO_BIDIRECTIONAL},
    ),
    _row(
        "gemma2",
        "Gemma2ForCausalLM",
        Gemma2Config,
        Gemma2,
        fields=nullable(_WINDOW, "final_logit_softcapping", "attn_logit_softcapping"),
        neutral=_NO_BIDIRECTIONAL,
        harmless=("cache_implementation", "sliding_window_size"),
    ),
    _row(
        "gemma3_text",
        "Gemma3ForCausalLM",
        Gemma3Config,
        Gemma3,
        fields=gemma3_fields,
        to_json=gemma3_json,
        neutral=_NO_BIDIRECTIONAL,
        harmless=("cache_implementation", "_sliding_window_pattern"),
    ),
    _row(
        "phi3",
        "Phi3ForCausalLM",
        Phi3Config,
        Phi3,
        fields=phi3_fields,
        to_json=phi3_json,
        neutral={
            **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), (None, False)),
            **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (None, 1)),
        },
        harmless=("embd_pdrop", "resid_pdrop"),
    ),
)
