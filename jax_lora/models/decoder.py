"""The Llama-like decoder: one module for every architecture in `architectures.py`.

The layers are one stack under `nn.scan`: every kernel is (layers, in, out). Arithmetic is in the
parameters' dtype; norms, rotary embedding and softmax are float32 inside.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_lora.models.activation_sharding import pin_rows
from jax_lora.models.activations import multiplied, soft_cap
from jax_lora.models.attention import Attention, LayerCache, LayerContext
from jax_lora.models.causal_decoder import CausalDecoder
from jax_lora.models.checkpoint_model import dense_maker, linear, token_table
from jax_lora.models.decoder_config import DecoderConfig, LayerKind
from jax_lora.models.decoder_inputs import MaskInputs
from jax_lora.models.experts import ExpertNames, SparseMLP, expert_layout
from jax_lora.models.layer_stack import layer_stack
from jax_lora.models.layout import Layout, dense, embedding, vector
from jax_lora.models.mlp import MLP
from jax_lora.models.norms import RMSNorm
from jax_lora.models.rotary import query_scale, rotary_angles

Angles = tuple[jax.Array, jax.Array]

# The norms of a layer by their position, by our names -> Hugging Face's.
_INPUT_NORM = {"input_norm": "input_layernorm"}
_ATTENTION_NORM = {"post_attention_norm": "post_attention_layernorm"}
_BEFORE_MLP = {"pre_feedforward_norm": "pre_feedforward_layernorm"}
_AFTER_MLP = {"post_feedforward_norm": "post_feedforward_layernorm"}
_NORMS = {
    "before": _INPUT_NORM | _ATTENTION_NORM,  # which is before the feed-forward block
    "around": _INPUT_NORM | _ATTENTION_NORM | _BEFORE_MLP | _AFTER_MLP,
    "after": _ATTENTION_NORM | _AFTER_MLP,
}
_QK_NORMS = {"attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderDesign:
    """The differences of an architecture from Llama that its configuration cannot change.

    Biases, multipliers, soft caps, windows and the sizes of experts are settings of the
    configuration.
    """

    qkv_bias: bool = False  # whether queries, keys and values always have a bias
    qk_norm: bool = False  # whether queries and keys are normalized before they are rotated
    joint_qk_norm: bool = False  # whether these norms are over all heads together
    fused: bool = False  # whether q, k and v are from one kernel, and gate and up from one
    norms: str = "before"  # `"before"` both blocks, `"after"` them, or `"around"` them
    wide_scales: bool = False  # whether norms multiply by the scale in float32
    gemma_scales: bool = False  # norms by 1 + scale in float32, embeddings by sqrt(hidden_size)
    experts: ExpertNames | None = None  # names in the files, for a mixture

    @property
    def attention_names(self) -> tuple[str, ...]:
        """Names of the dense layers of an attention block, the output projection last."""
        return ("qkv_proj", "o_proj") if self.fused else ("q_proj", "k_proj", "v_proj", "o_proj")

    @property
    def mlp_names(self) -> tuple[str, ...]:
        """Names of the dense layers of a feed-forward block without experts."""
        gate_up = ("gate_up_proj",) if self.fused else ("gate_proj", "up_proj")
        return (*gate_up, "down_proj")

    @property
    def norm_names(self) -> dict[str, str]:
        """Map our name of each norm of a layer to Hugging Face's."""
        return _NORMS[self.norms] | (_QK_NORMS if self.qk_norm else {})


def decoder_norm(
    config: DecoderConfig, design: DecoderDesign, param_dtype: Any, name: str | None = None
) -> RMSNorm:
    """Make the norm of a design."""
    gemma, eps = design.gemma_scales, config.rms_norm_eps
    offset = 1.0 if gemma else 0.0
    wide = gemma or design.wide_scales
    return RMSNorm(eps, offset, wide_scale=wide, param_dtype=param_dtype, name=name)


class DecoderLayer(nn.Module):
    """Attention and feed-forward block, each on a normed copy of x and added to x.

    Reference:
      Gemma 2 (arXiv:2408.00118), section 2, for norms around each block; OLMo 2
      (arXiv:2501.00656), section 3, for norms after each block.
    """

    config: Any  # a DecoderConfig
    design: DecoderDesign
    param_dtype: Any

    def setup(self):  # noqa: D102  Linen's hook
        c, design, dtype = self.config, self.design, self.param_dtype
        norm = functools.partial(decoder_norm, c, design, dtype)
        dense = dense_maker(c, dtype)
        if design.norms != "after":
            self.input_norm = norm()
        self.attn = Attention(
            dense,
            design.attention_names,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            bias=c.attention_bias or design.qkv_bias,
            out_bias=c.output_bias,
            qk_norm=norm if design.qk_norm else None,
            joint_norm=design.joint_qk_norm,
            scale=c.attention_scale,
            soft_cap=c.attn_logit_softcapping,
        )
        self.post_attention_norm = norm()
        if c.experts is None:
            names, width = design.mlp_names, c.intermediate_size
            self.mlp = MLP(dense, names, width, c.hidden_act, c.mlp_bias, fused=design.fused)
        else:
            self.mlp = SparseMLP(c, dtype, c.experts)
        if design.norms == "around":
            self.pre_feedforward_norm = norm()
        if design.norms != "before":
            self.post_feedforward_norm = norm()

    def __call__(
        self, x: jax.Array, contexts: LayerContext, cache: LayerCache | None, kind: jax.Array | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Apply the layer to x, (batch, tokens, hidden); called by `nn.scan`.

        With several kinds of layers, `contexts` are stacked by kind, and `kind` is the index of the
        layer's. A mask is stacked only if the kinds have different windows.
        """
        x = pin_rows(x)
        norms, factor = self.design.norms, self.config.residual_multiplier
        context = contexts if kind is None else self._context_of_kind(contexts, kind)
        inputs = x if norms == "after" else self.input_norm(x)
        attended, cache = self.attn(inputs, context, cache)
        if norms == "before":
            x = checkpoint_name(pin_rows(x + multiplied(attended, factor)), "attention_block")
            return x + multiplied(self.mlp(self.post_attention_norm(x)), factor), cache
        attended = checkpoint_name(pin_rows(attended), "attention_block")  # what the norm reads
        x = x + multiplied(self.post_attention_norm(attended), factor)
        inputs = x if norms == "after" else self.pre_feedforward_norm(x)
        y = checkpoint_name(self.mlp(inputs), "mlp_block")
        return x + multiplied(self.post_feedforward_norm(y), factor), cache

    def _context_of_kind(self, contexts: LayerContext, kind: jax.Array) -> LayerContext:
        """Index what is stacked: not the filled slots, nor the mask if all windows are equal."""
        shared = contexts.mask if len(_windows(self.config)) == 1 else None
        stacked = contexts._replace(filled=None, mask=contexts.mask if shared is None else None)
        of_kind: LayerContext = jax.tree.map(lambda each: each[kind], stacked)
        return of_kind._replace(
            filled=contexts.filled, mask=of_kind.mask if shared is None else shared
        )


def _windows(config: DecoderConfig) -> list[int | None]:
    """List the different windows of the layers."""
    return list(dict.fromkeys(kind.window for kind in config.layer_kinds))


def _angles(kind: LayerKind, config: DecoderConfig, positions: jax.Array) -> Angles:
    """Compute cosines and sines for a kind of layer; angles of 0 rotate nothing."""
    cos, sin = rotary_angles(kind.rope or config, positions)
    return (cos, sin) if kind.rope else (jnp.ones_like(cos), jnp.zeros_like(sin))


class Decoder(CausalDecoder):
    """Base of the Llama-like decoders; a subclass only sets its `design`."""

    design: ClassVar[DecoderDesign] = DecoderDesign()

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.embed_tokens = token_table(c, c.vocab_size, c.hidden_size, dtype)
        layers = layer_stack(
            DecoderLayer, c.num_hidden_layers, remat=self.remat, inputs_per_layer=2
        )
        self.layers = layers(c, self.design, dtype)
        self.final_norm = decoder_norm(c, self.design, dtype, "norm")
        if not c.tie_word_embeddings:
            self.lm_head = linear(c, c.vocab_size, False, dtype)

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """Layers, key-value heads and channels of a head."""
        c = self.config
        return c.num_hidden_layers, c.num_key_value_heads, c.head_dim

    def embed(self, input_ids: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Embed tokens: (batch, tokens) integers -> (batch, tokens, hidden)."""
        x = multiplied(self.embed_tokens(input_ids), self.config.embedding_multiplier)
        if not self.design.gemma_scales:
            return x
        # Rounded to x's dtype first, as the checkpoints were trained.
        return x * jnp.float32(math.sqrt(self.config.hidden_size)).astype(x.dtype)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Turn final hidden states (..., hidden) into logits (..., vocabulary)."""
        tied = self.config.tie_word_embeddings
        logits = self.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)
        logits = multiplied(logits, 1.0 / self.config.logits_scaling)
        return soft_cap(logits, self.config.final_logit_softcapping)

    def layer_inputs(
        self, positions: jax.Array, keys: int, given: MaskInputs, dtype: Any
    ) -> tuple[LayerContext, jax.Array | None]:
        """Make a context for each kind of layer, and find the kind of each layer.

        Returns:
          The context and None if all layers are of one kind; otherwise the contexts, stacked along
          a first axis, and their indices for all layers, (layers,) int32.
        """
        kinds, windows = list(dict.fromkeys(self.config.layer_kinds)), _windows(self.config)
        cap = self.config.attn_logit_softcapping
        made = self.masks(positions.shape[1], keys, given, windows, dtype, cap)
        masks = dict(zip(windows, made, strict=True))
        scale = query_scale(self.config, positions)
        contexts = [
            LayerContext(*_angles(kind, self.config, positions), masks[kind.window], None, scale)
            for kind in kinds
        ]
        if len(kinds) == 1:
            return contexts[0]._replace(filled=given[-1]), None
        if len(windows) == 1:
            contexts = [each._replace(mask=None) for each in contexts]
        stacked: LayerContext = jax.tree.map(lambda *each: jnp.stack(each), *contexts)
        if len(windows) == 1:
            stacked = stacked._replace(mask=made[0])
        numbers = np.array([kinds.index(kind) for kind in self.config.layer_kinds], np.int32)
        return stacked._replace(filled=given[-1]), jnp.asarray(numbers)

    def layout(self) -> Layout:
        """Map parameters to tensors, which have the names of Llama's."""
        c, design, layer = self.config, self.design, "model.layers.{layer}"
        placed = embedding("embed_tokens", "model.embed_tokens")
        for name in design.attention_names:
            bias = c.output_bias if name == "o_proj" else c.attention_bias or design.qkv_bias
            placed |= dense(f"layers/attn/{name}", f"{layer}.self_attn.{name}", bias=bias)
        for name in () if design.experts else design.mlp_names:
            placed |= dense(f"layers/mlp/{name}", f"{layer}.mlp.{name}", bias=c.mlp_bias)
        for ours, theirs in design.norm_names.items():
            placed |= vector(f"layers/{ours}/scale", f"{layer}.{theirs}.weight")
        placed |= vector("norm/scale", "model.norm.weight")
        if not c.tie_word_embeddings:
            placed |= dense("lm_head", "lm_head")
        return placed | expert_layout(design.experts) if design.experts else placed
