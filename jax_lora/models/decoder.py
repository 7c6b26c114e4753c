"""The Llama-like decoder: one module for every architecture in `architectures.py`.

The layers are one stack under `nn.scan`: every kernel is (layers, in, out). Arithmetic is in the
parameters' dtype; norms, rotary embedding and softmax are float32 inside.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.models.activations import soft_cap
from jax_lora.models.attention import Attention, LayerCache, LayerContext
from jax_lora.models.causal_decoder import CausalDecoder
from jax_lora.models.checkpoint_model import linear, token_table
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.decoder_inputs import MaskInputs, visible
from jax_lora.models.experts import ExpertNames, SparseMLP, expert_layout
from jax_lora.models.layer_stack import layer_stack
from jax_lora.models.layout import Layout, dense, embedding, vector
from jax_lora.models.mlp import GatedMLP
from jax_lora.models.norms import RMSNorm
from jax_lora.models.rotary import rotary_angles

__all__ = ["Decoder", "DecoderDesign", "decoder_norm"]

# The norms of a layer, by our names -> Hugging Face's.
_NORMS = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "pre_feedforward_norm": "pre_feedforward_layernorm",
    "post_feedforward_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderDesign:
    """What an architecture changes in a Llama, whatever its configuration says.

    Biases by `attention_bias` and `mlp_bias`, soft caps, windows and the sizes of experts follow
    from the configuration.

    Attributes:
      qkv_bias: Whether queries, keys and values always have a bias.
      qk_norm: Whether queries and keys are normalized before they are rotated.
      fused: Whether one kernel makes queries, keys and values, and one makes gate and up.
      sandwich: Whether the outputs of attention and feed-forward block are normalized too.
      gemma_scales: Whether norms multiply by 1 + scale in float32, and embeddings by
        sqrt(hidden_size).
      experts: Names of the experts' kernels in the files, for a mixture of experts.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    sandwich: bool = False
    gemma_scales: bool = False
    experts: ExpertNames | None = None

    @property
    def norm_names(self) -> dict[str, str]:
        """Our name of each of a layer's norms -> Hugging Face's."""
        more = (_SANDWICH_NORMS if self.sandwich else {}) | (_QK_NORMS if self.qk_norm else {})
        return _NORMS | more


def decoder_norm(config: DecoderConfig, design: DecoderDesign, param_dtype: Any) -> RMSNorm:
    """Make the norm of a design; it belongs to no module until one assigns it in `setup`."""
    gemma = design.gemma_scales
    return RMSNorm(
        config.rms_norm_eps,
        offset=1.0 if gemma else 0.0,
        wide_scale=gemma,
        param_dtype=param_dtype,
        parent=None,
    )


class DecoderLayer(nn.Module):
    """Attention and feed-forward block, each on a normed copy of x and added to x.

    Reference:
      Gemma 2 (arXiv:2408.00118), section 2, for the norms after each block (`sandwich`).
    """

    config: Any  # a DecoderConfig
    design: DecoderDesign
    param_dtype: Any

    def setup(self):  # noqa: D102  Linen's hook
        c, design, dtype = self.config, self.design, self.param_dtype
        self.input_norm = self._norm()
        scalar = c.query_pre_attn_scalar
        self.attn = Attention(
            c,
            dtype,
            bias=c.attention_bias or design.qkv_bias,
            out_bias=c.attention_bias,
            fused=design.fused,
            qk_norm=self._norm() if design.qk_norm else None,
            scale=None if scalar is None else scalar**-0.5,
            soft_cap=c.attn_logit_softcapping,
        )
        self.post_attention_norm = self._norm()
        if c.experts is None:
            self.mlp = GatedMLP(c, dtype, bias=c.mlp_bias, fused=design.fused)
        else:
            self.mlp = SparseMLP(c, dtype, c.experts)
        if design.sandwich:
            self.pre_feedforward_norm = self._norm()
            self.post_feedforward_norm = self._norm()

    def _norm(self) -> RMSNorm:
        return decoder_norm(self.config, self.design, self.param_dtype)

    def __call__(
        self,
        x: jax.Array,
        contexts: LayerContext,
        cache: LayerCache | None,
        kind: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Apply the layer; called by `nn.scan`.

        Args:
          x: (batch, tokens, hidden).
          contexts: Shared by all layers; with several kinds of layers, stacked by kind.
          cache: The layer's keys and values, or None.
          kind: int32 scalar, the index of the layer's kind; None if all layers are of one kind.

        Returns:
          x after the layer, and the layer's updated cache, if any.
        """
        context = contexts if kind is None else _context_of_kind(contexts, kind)
        attended, cache = self.attn(self.input_norm(x), context, cache)
        if not self.design.sandwich:
            x = x + attended
            return x + self.mlp(self.post_attention_norm(x)), cache
        x = x + self.post_attention_norm(attended)
        return x + self.post_feedforward_norm(self.mlp(self.pre_feedforward_norm(x))), cache


def _context_of_kind(contexts: LayerContext, kind: jax.Array) -> LayerContext:
    filled = contexts.filled  # a scalar, the same for every kind
    of_kind: LayerContext = jax.tree.map(lambda each: each[kind], contexts._replace(filled=None))
    return of_kind._replace(filled=filled)


class Decoder(CausalDecoder):
    """Base of the Llama-like decoders; a subclass gives its `design` and nothing else."""

    design: ClassVar[DecoderDesign] = DecoderDesign()

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.embed_tokens = token_table(c, c.vocab_size, c.hidden_size, dtype)
        layers = layer_stack(
            DecoderLayer, c.num_hidden_layers, remat=self.remat, inputs_per_layer=2
        )
        self.layers = layers(c, self.design, dtype)
        self.norm = decoder_norm(c, self.design, dtype)
        if not c.tie_word_embeddings:
            self.lm_head = linear(c, c.vocab_size, False, dtype)

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """Layers, key-value heads and channels of a head."""
        c = self.config
        return c.num_hidden_layers, c.num_key_value_heads, c.head_dim

    def embed(self, input_ids: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Embed tokens: (batch, tokens) integers -> (batch, tokens, hidden)."""
        x = self.embed_tokens(input_ids)
        if not self.design.gemma_scales:
            return x
        # Rounded to x's dtype first, as the checkpoints were trained.
        return x * jnp.float32(math.sqrt(self.config.hidden_size)).astype(x.dtype)

    def final_norm(self, x: jax.Array) -> jax.Array:
        """Normalize the last layer's hidden states, (batch, tokens, hidden)."""
        return self.norm(x)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Turn final hidden states (..., hidden) into logits (..., vocabulary)."""
        tied = self.config.tie_word_embeddings
        logits = self.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)
        return soft_cap(logits, self.config.final_logit_softcapping)

    def layer_inputs(
        self, positions: jax.Array, keys: int, given: MaskInputs
    ) -> tuple[LayerContext, jax.Array | None]:
        """Make one context per kind of layer, stacked if there are several, and each layer's kind.

        Returns:
          The context or contexts, and (layers,) int32, or None if there is one kind only.
        """
        kinds = list(dict.fromkeys(self.config.layer_kinds))
        # A window as long as the sequence masks nothing.
        windows = [None if k.window is None or k.window >= keys else k.window for k in kinds]
        causal = all(each is None for each in (*given, *windows))
        masks = [
            None if causal else visible(positions.shape[1], keys, *given, window)
            for window in windows
        ]
        contexts = [
            LayerContext(*rotary_angles(kind.rope, positions), mask, None)
            for kind, mask in zip(kinds, masks, strict=True)
        ]
        if len(kinds) == 1:
            return contexts[0]._replace(filled=given[-1]), None
        stacked: LayerContext = jax.tree.map(lambda *each: jnp.stack(each), *contexts)
        numbers = np.array([kinds.index(kind) for kind in self.config.layer_kinds], np.int32)
        return stacked._replace(filled=given[-1]), jnp.asarray(numbers)

    def layout(self) -> Layout:
        """Place the parameters in the files, under the names of Llama's."""
        c, design, layer = self.config, self.design, "model.layers.{layer}"
        qkv = ("qkv_proj",) if design.fused else ("q_proj", "k_proj", "v_proj")
        placed = embedding("embed_tokens", "model.embed_tokens")
        for name in (*qkv, "o_proj"):
            bias = c.attention_bias or (design.qkv_bias and name in qkv)
            placed |= dense(f"layers/attn/{name}", f"{layer}.self_attn.{name}", bias=bias)
        gate_up = ("gate_up_proj",) if design.fused else ("gate_proj", "up_proj")
        for name in () if design.experts else (*gate_up, "down_proj"):
            placed |= dense(f"layers/mlp/{name}", f"{layer}.mlp.{name}", bias=c.mlp_bias)
        for ours, theirs in design.norm_names.items():
            placed |= vector(f"layers/{ours}/scale", f"{layer}.{theirs}.weight")
        placed |= vector("norm/scale", "model.norm.weight")
        if not c.tie_word_embeddings:
            placed |= dense("lm_head", "lm_head")
        return placed | expert_layout(design.experts) if design.experts else placed
