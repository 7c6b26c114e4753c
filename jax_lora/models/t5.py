"""T5: an encoder and a decoder with cross-attention to it; relative position biases.

::

    logits = model.apply({"params": params}, input_ids, attention_mask, decoder_input_ids=answers)

Generation encodes the input once. The keys and values of the decoder and of the cross-attention are
in a cache, a pytree, which every call takes and returns updated::

    encoded = model.apply({"params": params}, input_ids, attention_mask, method="encode")
    cache, token = model.init_cache(batch, length, dtype), model.first_tokens(batch)
    for _ in range(length):
        logits, cache = model.apply(
            {"params": params}, token, encoded, attention_mask, cache=cache, method="decode"
        )
        token = logits[:, -1:].argmax(-1)

Reference:
    Raffel et al. (arXiv:1910.10683), section 2.1; Shazeer, GLU variants (arXiv:2002.05202), for
    the gated feed-forward block of version 1.1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_lora.errors import ConfigError
from jax_lora.models.activation_sharding import activation_mesh, pin_heads, pin_rows
from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.attention import LayerCache, update_cache
from jax_lora.models.checkpoint_model import CheckpointModel
from jax_lora.models.decoder_inputs import (
    KVCache,
    check_inputs,
    empty_cache,
    key_mask,
    query_slots,
    visible,
)
from jax_lora.models.family import Family, plain_json
from jax_lora.models.layer_stack import layer_stack
from jax_lora.models.layout import Layout, dense, embedding, vector
from jax_lora.models.mlp import MLP
from jax_lora.models.model_config import ModelConfig
from jax_lora.models.norms import RMSNorm
from jax_lora.models.relative_positions import bucket_of, bucket_table
from jax_lora.models.token_embedding import TokenEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """Configuration of a T5, named as in Hugging Face's `T5Config`.

    Args:
      num_decoder_layers: Layers of the decoder; 0: as many as the encoder has.
      feed_forward_proj: An activation; with the prefix "gated-" for a gated feed-forward block.
      dense_act_fn: The activation; empty: the one in `feed_forward_proj`.
      tie_word_embeddings: Whether the embedding is also the output head.
      scale_decoder_outputs: Whether the final hidden states are divided by the square root of
        `d_model`; None: in a tied model.
      decoder_start_token_id: The first token of every target; None: `pad_token_id`.

    Raises:
      ConfigError: If a size is not a positive integer, the activation is not implemented, or the
        buckets do not reach the largest distance.

    Example:
      >>> T5Config(feed_forward_proj="gated-gelu").dense_act_fn
      'gelu_new'
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 0
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    dense_act_fn: str = ""
    is_gated_act: bool | None = None
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    decoder_start_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        *gated, activation = str(self.feed_forward_proj).split("-")
        if gated not in ([], ["gated"]):
            expected, fix = "an activation, or 'gated-' and one", "name one that is implemented."
            self.fail("feed_forward_proj", expected, fix)
        # In version 1.1, "gelu" is the approximation by tanh.
        usual = "gelu_new" if self.feed_forward_proj == "gated-gelu" else activation
        self.set_default("dense_act_fn", usual, unset=("",))
        self.set_default("is_gated_act", bool(gated))
        self.set_default("num_decoder_layers", self.num_layers, unset=(0,))
        self.set_default("scale_decoder_outputs", self.tie_word_embeddings)
        self.set_default("decoder_start_token_id", self.pad_token_id)
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers")
        self.check_sizes((*sizes, "num_heads"))
        self.check_positive(("layer_norm_epsilon", "initializer_factor"))
        self.check_choice("dense_act_fn", ACTIVATIONS)
        self.check_choice("is_gated_act", (bool(gated),))
        self._check_buckets()

    @property
    def mlp_names(self) -> tuple[str, ...]:
        """Names of the dense layers of a feed-forward block."""
        return ("wi_0", "wi_1", "wo") if self.is_gated_act else ("wi", "wo")

    def _check_buckets(self) -> None:
        names = "relative_attention_num_buckets", "relative_attention_max_distance"
        self.check_sizes(names)
        buckets, most = (getattr(self, name) for name in names)
        if buckets < 4:
            self.fail(names[0], "at least 4", "half of them are for each direction.")
        if most <= buckets // 2:
            expected, fix = f"more than {buckets // 2}", "half of the buckets are of one distance."
            self.fail(names[1], expected, fix)


class T5Cache(NamedTuple):
    """Keys and values that the decoder has computed so far.

    Attributes:
      keys: (layers, batch, length, heads, d_kv), of the target's tokens.
      values: Same shape.
      filled: int32 scalar, number of the `length` slots that hold a token.
      text_keys: (layers, batch, input tokens, heads, d_kv), of the cross-attention to the input;
        None before the first call.
      text_values: Same shape.
    """

    keys: jax.Array
    values: jax.Array
    filled: jax.Array
    text_keys: jax.Array | None = None
    text_values: jax.Array | None = None


class _Context(NamedTuple):
    """The inputs that all layers of the encoder or of the decoder share."""

    bias: jax.Array  # (1, heads, queries, keys)
    mask: jax.Array | None  # (batch or 1, 1, queries or 1, keys) booleans
    filled: jax.Array | None = None  # int32 scalar; None without a cache
    encoded: Any = None  # (batch, input tokens, d_model); None in the encoder
    encoded_mask: jax.Array | None = None  # (batch, 1, 1, input tokens) booleans


class _Attention(nn.Module):
    """Attention whose scores are not scaled; the kernels are initialized smaller instead."""

    config: T5Config
    param_dtype: Any

    def setup(self):
        c, dense = self.config, _dense_maker(self.config, self.param_dtype)
        width, deviation = c.num_heads * c.d_kv, (c.d_model * c.d_kv) ** -0.5
        initial = nn.initializers.normal(c.initializer_factor * deviation)
        self.q, self.k = dense(width, kernel_init=initial), dense(width)
        self.v, self.o = dense(width), dense(c.d_model)

    def keys_values(self, x: jax.Array) -> LayerCache:
        """Project x, (batch, keys, d_model), to keys and values, (batch, keys, heads, d_kv)."""
        heads = (*x.shape[:2], self.config.num_heads, self.config.d_kv)
        return pin_heads(self.k(x).reshape(heads)), pin_heads(self.v(x).reshape(heads))

    def __call__(
        self, x: jax.Array, keys_values: LayerCache, bias: jax.Array | None, mask: jax.Array | None
    ) -> jax.Array:
        """(batch, queries, d_model) -> the same shape."""
        heads = (*x.shape[:2], self.config.num_heads, self.config.d_kv)
        q = checkpoint_name(pin_heads(self.q(x).reshape(heads)), "query")
        k, v = (part.astype(x.dtype) for part in keys_values)
        k, v = checkpoint_name(k, "key"), checkpoint_name(v, "value")
        # JAX itself promotes bfloat16 scores to float32 here, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=1.0)
        return self.o(pin_heads(y).reshape(*x.shape[:2], -1))


class T5Layer(nn.Module):
    """Self-attention, in the decoder cross-attention, and a feed-forward block."""

    config: T5Config
    param_dtype: Any
    decodes: bool

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.attn, self.attn_norm = _Attention(c, dtype), _norm(c, dtype)
        if self.decodes:
            self.cross_attn, self.cross_attn_norm = _Attention(c, dtype), _norm(c, dtype)
        self.mlp = MLP(_dense_maker(c, dtype), c.mlp_names, c.d_ff, c.dense_act_fn)
        self.mlp_norm = _norm(c, dtype)

    def __call__(
        self, x: jax.Array, context: _Context, cache: LayerCache | None, cross: LayerCache | None
    ) -> tuple[jax.Array, Any]:
        """Apply the layer to x, (batch, tokens, d_model); called by `nn.scan`.

        `cross` are keys and values of the encoded input, or None if they are not computed yet.
        Return x, and with a cache the updated cache and `cross`.
        """
        x = pin_rows(x)
        normed = self.attn_norm(x)
        k, v, cache = update_cache(cache, *self.attn.keys_values(normed), context.filled)
        attended = self.attn(normed, (k, v), context.bias, context.mask)
        x = checkpoint_name(pin_rows(x + attended), "attention_block")
        if cross is None and context.encoded is not None:
            cross = self.cross_attn.keys_values(context.encoded)
        if cross is not None:  # in the decoder only
            attended = self.cross_attn(self.cross_attn_norm(x), cross, None, context.encoded_mask)
            x = checkpoint_name(pin_rows(x + attended), "attention_block")
        x = x + self.mlp(self.mlp_norm(x))
        return x, None if cache is None else (cache, cross)


class _Stack(nn.Module):
    """The layers of the encoder or of the decoder, their shared position biases, a final norm."""

    config: T5Config
    remat: bool | str
    param_dtype: Any
    decodes: bool = False

    def setup(self):
        c, dtype = self.config, self.param_dtype
        depth = c.num_decoder_layers if self.decodes else c.num_layers
        layers = layer_stack(T5Layer, depth, remat=self.remat, inputs_per_layer=2)
        self.layers = layers(c, dtype, self.decodes)
        initial = nn.initializers.normal(c.initializer_factor * c.d_model**-0.5)
        buckets = c.relative_attention_num_buckets
        self.relative_attention_bias = nn.Embed(
            buckets, c.num_heads, embedding_init=initial, param_dtype=dtype
        )
        self.norm = _norm(c, dtype)

    def bias(self, queries: int, keys: int, filled: jax.Array | None) -> jax.Array:
        """Look up the position biases of the scores, (1, heads, queries, keys)."""
        c = self.config
        table = bucket_table(
            c.relative_attention_num_buckets,
            c.relative_attention_max_distance,
            both_ways=not self.decodes,
        )
        ids = bucket_of(table, query_slots(queries, filled), query_slots(keys, None))
        return self.relative_attention_bias(ids).transpose(2, 0, 1)[None]

    def __call__(
        self, x: jax.Array, context: _Context, cache: LayerCache | None, cross: LayerCache | None
    ) -> tuple[jax.Array, Any]:
        """(batch, tokens, d_model) -> the same shape, normed, and the outputs of `T5Layer`."""
        x, outputs = self.layers(x, context, cache, cross)
        return self.norm(pin_rows(x)), outputs


class T5(CheckpointModel):
    """T5 encoder-decoder; see `CheckpointModel` for the attributes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
      >>> model, text, answer = T5(config), jnp.array([[3, 1, 4]]), jnp.array([[0, 2]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), text)["params"]  # or jax.jit
      >>> jax.eval_shape(model.apply, {"params": params}, text, decoder_input_ids=answer).shape
      (1, 2, 16)
    """

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        initial = nn.initializers.normal(c.initializer_factor)
        self.shared = TokenEmbedding(
            c.vocab_size, c.d_model, embedding_init=initial, param_dtype=dtype
        )
        self.encoder = _Stack(c, self.remat, dtype)
        self.decoder = _Stack(c, self.remat, dtype, decodes=True)
        if not c.tie_word_embeddings:
            self.lm_head = _dense_maker(c, dtype)(c.vocab_size, kernel_init=initial)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        return_hidden: bool = False,
    ) -> jax.Array:
        """Score every next token of the targets.

        Args:
          input_ids: (batch, input tokens) integers.
          attention_mask: (batch, input tokens), 1 at real tokens and 0 at padding. None: no
            padding.
          decoder_input_ids: (batch, tokens) integers, the targets, which start with `first_tokens`.
            None: `first_tokens` alone.
          decoder_attention_mask: (batch, tokens), the same for the targets.
          return_hidden: Whether to return the input of `unembed`, (batch, tokens, d_model),
            instead of logits.

        Returns:
          Logits (batch, tokens, vocabulary) in the parameters' dtype.

        Raises:
          ConfigError: If an argument's shape does not fit the others.
        """
        if decoder_input_ids is None:
            decoder_input_ids = self.first_tokens(input_ids.shape[0])
        encoded = self.encode(input_ids, attention_mask)
        return self.decode(
            decoder_input_ids,
            encoded,
            attention_mask,
            decoder_attention_mask,
            return_hidden=return_hidden,
        )

    def encode(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Encode inputs: (batch, input tokens) integers -> (batch, input tokens, d_model)."""
        check_inputs(input_ids, attention_mask)
        tokens = input_ids.shape[1]
        bias = self.encoder.bias(tokens, tokens, None)
        mask = None if attention_mask is None else key_mask(attention_mask)
        context = _Context(bias, mask)
        with activation_mesh(self.mesh):
            return self.encoder(self.shared(input_ids), context, None, None)[0]

    def decode(
        self,
        decoder_input_ids: jax.Array,
        encoded: jax.Array | None,
        attention_mask: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        *,
        cache: T5Cache | None = None,
        return_hidden: bool = False,
    ) -> Any:
        """Score every next token of the targets, given encoded inputs.

        Args:
          decoder_input_ids: (batch, tokens) integers; with a cache, the tokens that follow those
            in it.
          encoded: (batch, input tokens, d_model), from `encode`; with a cache, only the first call
            needs it.
          attention_mask: (batch, input tokens), that of the inputs.
          decoder_attention_mask: (batch, tokens), that of the targets; with a cache (batch, cache
            length).
          cache: From `init_cache` or an earlier call; the tokens are appended to it.
          return_hidden: Whether to return the input of `unembed`, (batch, tokens, d_model),
            instead of logits.

        Returns:
          Logits (batch, tokens, vocabulary); with a cache `(logits, cache)`.

        Raises:
          ConfigError: If an argument's shape does not fit the others.
        """
        own = None if cache is None else KVCache(cache.keys, cache.values, cache.filled)
        check_inputs(decoder_input_ids, decoder_attention_mask, cache=own)
        self._check_encoded(decoder_input_ids, encoded, attention_mask, cache)
        tokens = decoder_input_ids.shape[1]
        keys, filled = (tokens, None) if cache is None else (cache.keys.shape[2], cache.filled)
        context = _Context(
            bias=self.decoder.bias(tokens, keys, filled),
            mask=visible(tokens, keys, decoder_attention_mask, None, filled),
            filled=filled,
            encoded=encoded,
            encoded_mask=None if attention_mask is None else key_mask(attention_mask),
        )
        layer_caches = None if cache is None else (cache.keys, cache.values)
        cross = None
        if cache is not None and cache.text_keys is not None and cache.text_values is not None:
            cross = (cache.text_keys, cache.text_values)
        with activation_mesh(self.mesh):
            x, outputs = self.decoder(self.shared(decoder_input_ids), context, layer_caches, cross)
        y = x if return_hidden else self.unembed(x)
        if cache is None:
            return y
        (keys, values), cross = outputs
        return y, T5Cache(keys, values, cache.filled + jnp.int32(tokens), *cross)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Turn the decoder's final hidden states (..., d_model) into logits (..., vocabulary)."""
        c = self.config
        if c.scale_decoder_outputs:
            hidden = hidden * jnp.asarray(c.d_model**-0.5, hidden.dtype)
        return self.shared.attend(hidden) if c.tie_word_embeddings else self.lm_head(hidden)

    def first_tokens(self, batch: int) -> jax.Array:
        """Return the first token of every target, (batch, 1) integers."""
        return jnp.full((batch, 1), self.config.decoder_start_token_id or 0, jnp.int32)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> T5Cache:
        """Make an empty cache. Call it as `model.init_cache(...)`, without `apply`.

        Args:
          batch: Number of targets that are generated together.
          length: Maximum number of tokens of a target, the first included.
          dtype: Dtype of keys and values; with the parameters' dtype nothing is rounded.

        Returns:
          A `T5Cache` of zeros.
        """
        c = self.config
        shape = (c.num_decoder_layers, batch, length, c.num_heads, c.d_kv)
        return T5Cache(*empty_cache(shape, dtype))

    def layout(self) -> Layout:
        """Map parameters to tensors."""
        placed = embedding("shared", "shared")
        for stack in ("encoder", "decoder"):
            heads = ("q", "k", "v", "o")
            cross = [("cross_attn", "EncDecAttention", heads)] if stack == "decoder" else []
            mlp = ("mlp", "DenseReluDense", self.config.mlp_names)
            parts = [("attn", "SelfAttention", heads), *cross, mlp]
            for number, (part, theirs, names) in enumerate(parts):
                layer = f"{stack}.block.{{layer}}.layer.{number}"
                for name in names:
                    placed |= dense(f"{stack}/layers/{part}/{name}", f"{layer}.{theirs}.{name}")
                placed |= vector(f"{stack}/layers/{part}_norm/scale", f"{layer}.layer_norm.weight")
            # The files store the biases, which all layers share, with the first layer.
            biases = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
            placed |= embedding(f"{stack}/relative_attention_bias", biases)
            placed |= vector(f"{stack}/norm/scale", f"{stack}.final_layer_norm.weight")
        return placed if self.config.tie_word_embeddings else placed | dense("lm_head", "lm_head")

    def _check_encoded(
        self,
        ids: jax.Array,
        encoded: jax.Array | None,
        attention_mask: jax.Array | None,
        cache: T5Cache | None,
    ) -> None:
        """Raise unless the encoded input, or its keys in the cache, fits targets and mask."""
        shape = None if encoded is None else encoded.shape[:2]
        if cache is not None and cache.text_keys is not None:
            shape = cache.text_keys.shape[1:3]
        if shape is None:
            fix = "only a cache from an earlier call can replace it."
            raise ConfigError("encoded", got="None", expected="the output of encode", fix=fix)
        if shape[0] != ids.shape[0]:
            got, expected = f"{shape[0]} inputs", f"{ids.shape[0]}, one for each target"
            raise ConfigError(
                "encoded", got=got, expected=expected, fix="encode the inputs of these targets."
            )
        if attention_mask is not None and attention_mask.shape != shape:
            got, expected = f"shape {attention_mask.shape}", f"shape {shape}"
            fix = "give the mask of the encoded inputs."
            raise ConfigError("attention_mask", got=got, expected=expected, fix=fix)


def _dense_maker(config: T5Config, param_dtype: Any) -> Callable[..., nn.Dense]:
    """Return `nn.Dense` without a bias, with kernels of deviation factor / sqrt(inputs)."""

    def initial(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        deviation = config.initializer_factor * shape[0] ** -0.5
        return nn.initializers.normal(deviation)(key, shape, dtype)

    return functools.partial(nn.Dense, use_bias=False, kernel_init=initial, param_dtype=param_dtype)


def _norm(config: T5Config, param_dtype: Any) -> RMSNorm:
    return RMSNorm(config.layer_norm_epsilon, param_dtype=param_dtype)


# -----------------------------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------------------------


def _settle(config: T5Config, read: Callable[[str], np.ndarray | None]) -> T5Config:
    """Find out from the tensors whether the model is tied; newer files call every T5 tied."""
    head, tied = read("lm_head.weight"), config.tie_word_embeddings
    if head is None:
        tied = True
    elif tied:
        embedding = read("shared.weight")
        tied = embedding is not None and np.array_equal(head, embedding)
    return dataclasses.replace(config, tie_word_embeddings=tied)


def _to_json(config: T5Config) -> dict[str, Any]:
    fields = {**plain_json(config), "is_encoder_decoder": True}
    del fields["initializer_range"]
    return fields


FAMILY = Family(
    model_type="t5",
    architectures=("T5ForConditionalGeneration", "T5WithLMHeadModel"),
    config=T5Config,
    module=T5,
    to_json=_to_json,
    settle=_settle,
    neutral={"is_encoder_decoder": (None, True)},
    harmless=("dropout_rate", "classifier_dropout", "n_positions", "output_past"),
    # Copies of the embedding, and biases that the cross-attention does not use.
    redundant=(
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
    embedding="shared/embedding",
    decodes=False,
    depth=None,
)
