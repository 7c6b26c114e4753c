"""The Llama-like architectures, one entry each.

An entry has three parts: a configuration with the fields and defaults of its `config.json`, a class
with its `DecoderDesign`, and a row of the table `DECODERS`. `docs/adding_a_model.md` has the steps
to add one.

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
    ministral3_fields,
    mistral3_fields,
    phi3_fields,
    phi3_json,
    qwen3_moe_fields,
    qwen3_moe_json,
)
from jax_lora.models.experts import ExpertNames
from jax_lora.models.family import Family, nullable
from jax_lora.models.layout import Layout
from jax_lora.models.model_config import is_positive
from jax_lora.models.text_parts import (
    TextPartConfig,
    settle_text_part,
    text_part_json,
    text_part_layout,
)

__all__ = [
    "Gemma",
    "Gemma2",
    "Gemma2Config",
    "Gemma3",
    "Gemma3Config",
    "Gemma3TextPart",
    "Gemma3TextPartConfig",
    "GemmaConfig",
    "Granite",
    "GraniteConfig",
    "Llama",
    "LlamaConfig",
    "Ministral3",
    "Ministral3Config",
    "Mistral",
    "Mistral3TextPart",
    "Mistral3TextPartConfig",
    "MistralConfig",
    "Mixtral",
    "MixtralConfig",
    "Olmo2",
    "Olmo2Config",
    "Phi3",
    "Phi3Config",
    "Qwen2",
    "Qwen2Config",
    "Qwen3",
    "Qwen3Config",
    "Qwen3MoE",
    "Qwen3MoEConfig",
    "SeedOss",
    "SeedOssConfig",
    "SmolLM3",
    "SmolLM3Config",
]


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
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> params["layers"]["attn"]["q_proj"]["kernel"].shape
      (2, 8, 8)
      >>> jax.jit(model.apply)({"params": params}, ids).shape
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
    max_window_layers: int = 28  # the first layer with a window, if `use_sliding_window`

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
      >>> GemmaConfig(hidden_act="gelu").hidden_act  # the tanh form, in the first files
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
        """Alternate between layers with and without a window, starting with one."""
        return tuple(FULL if i % 2 else SLIDING for i in range(self.num_hidden_layers))


class Gemma2(Decoder):
    """Gemma 2: soft caps on scores and logits, norms around each block, windows in some layers.

    Reference:
      Gemma Team (arXiv:2408.00118), section 2.
    """

    design = DecoderDesign(gemma_scales=True, norms="around")


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

    design = DecoderDesign(gemma_scales=True, norms="around", qk_norm=True)


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
    original_max_position_embeddings: int = 4096  # the trained length, for longrope
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
        """Give longrope its usual name, and add the settings that Phi-3 has as fields."""
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
    """Phi-3 and Phi-4, both with the `model_type` "phi3": a Llama with fused kernels and longrope.

    With longrope, one call rotates all tokens by the short or by the long factors, depending on
    its longest position. Keys in a cache keep their rotation, so do not let one cache grow beyond
    the trained length.

    Reference:
      Abdin et al. (arXiv:2404.14219), section 2; Ding et al., LongRoPE (arXiv:2402.13753).
    """

    design = DecoderDesign(fused=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Config(MixedLayersConfig):
    """Configuration of a SmolLM3, named as in Hugging Face's `SmolLM3Config`.

    Example:
      >>> SmolLM3Config(num_hidden_layers=4, no_rope_layer_interval=2).no_rope_layers
      (1, 0, 1, 0)
    """

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    max_position_embeddings: int = 32768
    rope_theta: float = 2e6
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    no_rope_layer_interval: int = 4  # every fourth layer has no rotary embedding
    no_rope_layers: tuple[int, ...] | None = None  # 0: a layer without rotary embedding

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        self.check_sizes(("no_rope_layer_interval", "num_hidden_layers"))
        interval, numbers = self.no_rope_layer_interval, range(1, self.num_hidden_layers + 1)
        self.set_default("no_rope_layers", tuple(int(i % interval != 0) for i in numbers))
        rotated = self.no_rope_layers or ()
        if set(rotated) - {0, 1} or len(rotated) != self.num_hidden_layers:
            expected = f"0 or 1 for each of {self.num_hidden_layers} layers"
            self.fail("no_rope_layers", expected, "write 0 for a layer without rotary positions.")
        super().__post_init__()

    def default_layer_types(self) -> tuple[str, ...]:
        """Give the layers without rotary positions a window if `use_sliding_window` is set."""
        full = self.window is None
        return tuple(FULL if full or rotated else SLIDING for rotated in self.no_rope_layers or ())

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, in order."""
        pairs = zip(super().layer_kinds, self.no_rope_layers or (), strict=True)
        return tuple(kind if rotated else kind._replace(rope=None) for kind, rotated in pairs)


class SmolLM3(Decoder):
    """SmolLM3: a Llama in which every fourth layer has no rotary positions.

    Reference:
      Yang et al., RNoPE (arXiv:2501.18795), for layers without rotary positions.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo2Config(DecoderConfig):
    """Configuration of an OLMo 2, named as in Hugging Face's `Olmo2Config`."""

    vocab_size: int = 50304
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False


class Olmo2(Decoder):
    """OLMo 2: a Llama with norms after each block, and a norm over all heads of queries or keys.

    Reference:
      OLMo Team (arXiv:2501.00656), section 3.
    """

    design = DecoderDesign(norms="after", qk_norm=True, joint_qk_norm=True, wide_scales=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteConfig(LlamaConfig):
    """Configuration of a Granite, named as in Hugging Face's `GraniteConfig`."""

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0  # the factor on the scores, instead of 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0  # factor on the outputs of attention and feed-forward
    logits_scaling: float = 1.0  # logits are divided by it

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        super().__post_init__()
        names = "embedding_multiplier attention_multiplier residual_multiplier logits_scaling"
        self.check_positive(names.split())


class Granite(Decoder):
    """Granite 3: a Llama with a constant factor on embeddings, scores, residuals and logits.

    Reference:
      Yang et al., Tensor Programs V (arXiv:2203.03466), for the factors.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedOssConfig(LlamaConfig):
    """Configuration of a Seed-OSS, named as in Hugging Face's `SeedOssConfig`."""

    vocab_size: int = 155136
    intermediate_size: int = 27648
    num_hidden_layers: int = 64
    num_attention_heads: int = 80
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 524288
    attention_bias: bool = True
    attention_out_bias: bool = False


class SeedOss(Decoder):
    """Seed-OSS: a Llama with biases on queries, keys and values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ministral3Config(MistralConfig):
    """Configuration of a Ministral 3 text model, named as in Hugging Face's `Ministral3Config`.

    Its rotary settings can have `llama_4_scaling_beta`.
    """

    vocab_size: int = 131072
    num_hidden_layers: int = 34
    head_dim: int = 128
    max_position_embeddings: int = 262144
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        super().__post_init__()
        scaling = self.rope_scaling or {}
        if self.llama_4_scaling_beta is not None:
            for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
                if not is_positive(scaling.get(name)):
                    fix = f"set {name} in rope_scaling."
                    expected = "a positive number"
                    self.fail_at(f"rope_scaling: {name}", scaling.get(name), expected, fix)

    @property
    def llama_4_scaling_beta(self) -> float | None:
        """The setting of this name in `rope_scaling`, if any."""
        return (self.rope_scaling or {}).get("llama_4_scaling_beta")


class Ministral3(Decoder):
    """Ministral 3: a Mistral whose scores grow with the position beyond the trained length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3TextPartConfig(TextPartConfig, Gemma3Config):
    """Configuration of the text part of a Gemma 3 with a vision tower, from `text_config`."""


class _TextPart(Decoder):
    def layout(self) -> Layout:
        """Map parameters to tensors, which have the names of the whole model's."""
        return text_part_layout(super().layout(), self.config)


class Gemma3TextPart(_TextPart, Gemma3):
    """The text part of a Gemma 3 of 4 to 27 billion parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mistral3TextPartConfig(TextPartConfig, Ministral3Config):
    """Configuration of the text part of a Mistral 3 with a vision tower, from `text_config`.

    Args:
      text_type: `model_type` of the text model: "mistral" or "ministral3".
    """

    text_type: str = "mistral"

    @property
    def llama_4_scaling_beta(self) -> float | None:
        """As in `Ministral3Config`; a Mistral does not use this setting."""
        return super().llama_4_scaling_beta if self.text_type == "ministral3" else None


class Mistral3TextPart(_TextPart):
    """The text part of a Mistral Small 3.1 or 3.2, or of a Ministral 3."""


# -----------------------------------------------------------------------------------------------
# The table
# -----------------------------------------------------------------------------------------------

_WINDOW = "sliding_window"
_TEXT_HEADS = (r"(language_model\.)?lm_head\.weight",)
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
    _row(
        "smollm3",
        "SmolLM3ForCausalLM",
        SmolLM3Config,
        SmolLM3,
        fields=nullable(_WINDOW),
        harmless=("max_window_layers",),
    ),
    _row("olmo2", "Olmo2ForCausalLM", Olmo2Config, Olmo2),
    _row("granite", "GraniteForCausalLM", GraniteConfig, Granite),
    _row("seed_oss", "SeedOssForCausalLM", SeedOssConfig, SeedOss, harmless=("residual_dropout",)),
    _row(
        "ministral3",
        "Ministral3ForCausalLM",
        Ministral3Config,
        Ministral3,
        fields=ministral3_fields,
    ),
    _row(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        Gemma3TextPartConfig,
        Gemma3TextPart,
        fields=gemma3_fields,
        to_json=text_part_json(gemma3_json, lambda config: "gemma3_text"),
        settle=settle_text_part,
        neutral=_NO_BIDIRECTIONAL,
        harmless=("cache_implementation", "_sliding_window_pattern", "text_type"),
        tied_copies=_TEXT_HEADS,
        text_types=("gemma3_text",),
    ),
    _row(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        Mistral3TextPartConfig,
        Mistral3TextPart,
        fields=mistral3_fields,
        to_json=text_part_json(decoder_json, lambda config: config.text_type),
        settle=settle_text_part,
        tied_copies=_TEXT_HEADS,
        text_types=("mistral", "ministral3"),
    ),
)
