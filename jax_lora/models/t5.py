"""T5: an encoder and a decoder that looks at it, with biases by distance for positions.

::

    logits = model.apply({"params": params}, input_ids, attention_mask, decoder_input_ids=answers)

Generation encodes the text once, and keeps the decoder's keys and values, and those of the text,
in a cache, an ordinary pytree that goes in and comes out::

    encoded = model.apply({"params": params}, input_ids, attention_mask, method="encode")
    cache, token = model.init_cache(batch, length, dtype), model.first_tokens(batch)
    for _ in range(length):
        logits, cache = model.apply(
            {"params": params}, token, encoded, attention_mask, cache=cache, method="decode"
        )
        token = logits[:, -1:].argmax(-1)

Reference:
    Raffel et al. (arXiv:1910.10683), section 2.1; Shazeer, GLU variants (arXiv:2002.05202), for
    the gated feed-forward part of version 1.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.errors import ConfigError, format_error
from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.attention import Memory, remember
from jax_lora.models.decoder_inputs import KVCache, check_inputs, visible
from jax_lora.models.family import Family, plain_json
from jax_lora.models.layout import Layout, Placement, StandsInFiles, dense, vector
from jax_lora.models.model_config import ModelConfig
from jax_lora.models.norms import RMSNorm
from jax_lora.models.relative_positions import bucket_of, bucket_table

__all__ = ["T5", "T5Cache", "T5Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """Sizes and switches of a T5, named as in Hugging Face's `T5Config`.

    Args:
      num_decoder_layers: Layers of the decoder; 0: as many as the encoder has.
      feed_forward_proj: An activation, "gated-" before it for a gated feed-forward part.
      dense_act_fn: The activation; empty: what `feed_forward_proj` says.
      tie_word_embeddings: Whether the embedding is the output head too.
      scale_decoder_outputs: Whether the last hidden states are divided by the root of `d_model`;
        None: in a tied model.
      decoder_start_token_id: The token that every answer starts with; None: `pad_token_id`.

    Raises:
      ConfigError: for a size that is no positive integer, an activation that is not implemented,
        buckets that do not reach the largest distance.

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

    def __post_init__(self) -> None:  # noqa: D105  fills in what is derived, then checks
        *gated, activation = str(self.feed_forward_proj).split("-")
        if gated not in ([], ["gated"]):
            expected, fix = "an activation, or 'gated-' and one", "name one that is implemented."
            self.refuse("feed_forward_proj", self.feed_forward_proj, expected, fix)
        # What version 1.1 calls gelu is the approximation by tanh.
        usual = "gelu_new" if self.feed_forward_proj == "gated-gelu" else activation
        self._derive("dense_act_fn", "", usual)
        self._derive("is_gated_act", None, bool(gated))
        self._derive("num_decoder_layers", 0, self.num_layers)
        self._derive("scale_decoder_outputs", None, self.tie_word_embeddings)
        self._derive("decoder_start_token_id", None, self.pad_token_id)
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers")
        self.check_sizes((*sizes, "num_heads"))
        self.check_positive(("layer_norm_epsilon", "initializer_factor"))
        self.check_choice("dense_act_fn", ACTIVATIONS)
        self.check_choice("is_gated_act", (bool(gated),))
        self._check_buckets()

    def _derive(self, name: str, absent: Any, value: Any) -> None:
        if getattr(self, name) == absent:
            object.__setattr__(self, name, value)

    def _check_buckets(self) -> None:
        names = "relative_attention_num_buckets", "relative_attention_max_distance"
        self.check_sizes(names)
        buckets, most = (getattr(self, name) for name in names)
        if buckets < 4:
            self.refuse(names[0], buckets, "at least 4", "half of them are for each direction.")
        if most <= buckets // 2:
            expected, fix = f"more than {buckets // 2}", "half of the buckets are of one distance."
            self.refuse(names[1], most, expected, fix)


class T5Cache(NamedTuple):
    """What the decoder keeps of the tokens and of the text that it has seen.

    Attributes:
      keys: (layers, batch, length, heads, d_kv), of the answer's tokens.
      values: same shape.
      filled: int32 scalar, how many of the `length` slots hold a token.
      text_keys: (layers, batch, text tokens, heads, d_kv), or None before the first call.
      text_values: same shape.
    """

    keys: jax.Array
    values: jax.Array
    filled: jax.Array
    text_keys: jax.Array | None = None
    text_values: jax.Array | None = None


class _Shared(NamedTuple):
    """What every layer of a stack gets alike."""

    bias: jax.Array  # (1, heads, queries, keys)
    mask: jax.Array | None  # (batch or 1, 1, queries or 1, keys) booleans
    filled: jax.Array | None = None  # int32 scalar; None without a cache
    text: Any = None  # (batch, text tokens, d_model), the encoder's output; None in the encoder
    text_mask: jax.Array | None = None  # (batch, 1, 1, text tokens) booleans


class _Attention(nn.Module):
    """Queries, keys and values; scores are not scaled, which the initial kernels make up for."""

    config: T5Config
    param_dtype: Any

    def setup(self):
        c, width = self.config, self.config.num_heads * self.config.d_kv
        self.q = self._linear(width, (c.d_model * c.d_kv) ** -0.5)
        self.k = self._linear(width, c.d_model**-0.5)
        self.v = self._linear(width, c.d_model**-0.5)
        self.o = self._linear(c.d_model, width**-0.5)

    def _linear(self, features: int, deviation: float) -> nn.Dense:
        return _linear(self.config, features, deviation, self.param_dtype)

    def remembered(self, x: jax.Array) -> Memory:
        """Keys and values of x: (batch, keys, d_model) -> (batch, keys, heads, d_kv) each."""
        heads = (*x.shape[:2], self.config.num_heads, self.config.d_kv)
        return self.k(x).reshape(heads), self.v(x).reshape(heads)

    def __call__(
        self, x: jax.Array, memory: Memory, bias: jax.Array | None, mask: jax.Array | None
    ) -> jax.Array:
        """x: (batch, queries, d_model) -> the same shape."""
        heads = (*x.shape[:2], self.config.num_heads, self.config.d_kv)
        q = self.q(x).reshape(heads)
        k, v = (part.astype(x.dtype) for part in memory)
        # Its own promotion of bfloat16 scores to float32 is refused by strict dtype promotion.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=1.0)
        return self.o(y.reshape(*x.shape[:2], -1))


class _MLP(nn.Module):
    config: T5Config
    param_dtype: Any

    def setup(self):
        c, dtype = self.config, self.param_dtype
        if c.is_gated_act:
            self.wi_0 = _linear(c, c.d_ff, c.d_model**-0.5, dtype)
            self.wi_1 = _linear(c, c.d_ff, c.d_model**-0.5, dtype)
        else:
            self.wi = _linear(c, c.d_ff, c.d_model**-0.5, dtype)
        self.wo = _linear(c, c.d_model, c.d_ff**-0.5, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, d_model) -> the same shape."""
        activation = ACTIVATIONS[self.config.dense_act_fn]
        if self.config.is_gated_act:
            inner = activation(self.wi_0(x)) * self.wi_1(x)  # (batch, tokens, d_ff)
        else:
            inner = activation(self.wi(x))
        return self.wo(inner)


class T5Layer(nn.Module):
    """Attention, in a decoder attention to the text, then the feed-forward part."""

    config: T5Config
    param_dtype: Any
    decodes: bool

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.attn, self.attn_norm = _Attention(c, dtype), _norm(c, dtype)
        if self.decodes:
            self.cross_attn, self.cross_attn_norm = _Attention(c, dtype), _norm(c, dtype)
        self.mlp, self.mlp_norm = _MLP(c, dtype), _norm(c, dtype)

    def __call__(
        self, x: jax.Array, shared: _Shared, memory: Memory | None, text: Memory | None
    ) -> tuple[jax.Array, Any]:
        """Scanned, so it returns (carry, this layer's output).

        Args:
          x: (batch, tokens, d_model).
          shared: What every layer gets alike.
          memory: The layer's keys and values of the answer so far, or None.
          text: Those of the text, or None where they are still to be made.
        """
        normed = self.attn_norm(x)
        seen = self.attn.remembered(normed)
        if memory is not None and shared.filled is not None:
            seen = memory = remember(memory, *seen, shared.filled)
        x = x + self.attn(normed, seen, shared.bias, shared.mask)
        if text is None and shared.text is not None:
            text = self.cross_attn.remembered(shared.text)
        if text is not None:  # only a decoder's layer has one
            x = x + self.cross_attn(self.cross_attn_norm(x), text, None, shared.text_mask)
        x = x + self.mlp(self.mlp_norm(x))
        return x, None if memory is None else (memory, text)


class _Stack(nn.Module):
    """The layers of the encoder or of the decoder, the biases that they share, and a last norm."""

    config: T5Config
    remat: bool
    param_dtype: Any
    decodes: bool = False

    def setup(self):
        c, dtype = self.config, self.param_dtype
        # Under scan the loop itself keeps XLA from undoing the recomputation.
        self.layers = nn.scan(
            nn.remat(T5Layer, prevent_cse=False) if self.remat else T5Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]  Flax: Any will do
            length=c.num_decoder_layers if self.decodes else c.num_layers,
        )(c, dtype, self.decodes)
        initial = nn.initializers.normal(c.initializer_factor * c.d_model**-0.5)
        buckets = c.relative_attention_num_buckets
        self.relative_attention_bias = nn.Embed(
            buckets, c.num_heads, embedding_init=initial, param_dtype=dtype
        )
        self.norm = _norm(c, dtype)

    def bias(self, queries: int, keys: int, filled: jax.Array | None) -> jax.Array:
        """(1, heads, queries, keys): what distances add to scores."""
        c = self.config
        table = bucket_table(
            c.relative_attention_num_buckets,
            c.relative_attention_max_distance,
            both_ways=not self.decodes,
        )
        rows = jnp.arange(queries, dtype=jnp.int32)
        rows = rows if filled is None else rows + jnp.broadcast_to(filled, rows.shape)
        ids = bucket_of(table, rows, jnp.arange(keys, dtype=jnp.int32))  # (queries, keys)
        return self.relative_attention_bias(ids).transpose(2, 0, 1)[None]

    def __call__(
        self, x: jax.Array, shared: _Shared, memory: Memory | None, text: Memory | None
    ) -> tuple[jax.Array, Any]:
        """x: (batch, tokens, d_model) -> the same shape normed, and what the layers remember."""
        x, remembered = self.layers(x, shared, memory, text)
        return self.norm(x), remembered


class T5(StandsInFiles, nn.Module):
    """T5 encoder-decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
      >>> model, text, answer = T5(config), jnp.array([[3, 1, 4]]), jnp.array([[0, 2]])
      >>> params = jax.jit(model.init)(jax.random.key(0), text)["params"]
      >>> jax.jit(model.apply)({"params": params}, text, decoder_input_ids=answer).shape
      (1, 2, 16)
    """

    config: T5Config
    remat: bool = False
    param_dtype: Any = jnp.float32

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        initial = nn.initializers.normal(c.initializer_factor)
        self.shared = nn.Embed(c.vocab_size, c.d_model, embedding_init=initial, param_dtype=dtype)
        self.encoder = _Stack(c, self.remat, dtype)
        self.decoder = _Stack(c, self.remat, dtype, decodes=True)
        if not c.tie_word_embeddings:
            self.lm_head = _linear(c, c.vocab_size, 1.0, dtype)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        return_hidden: bool = False,
    ) -> jax.Array:
        """Score every next token of the answers to texts.

        Args:
          input_ids: (batch, text tokens) integers.
          attention_mask: (batch, text tokens), 1 at real tokens and 0 at padding. None: no padding.
          decoder_input_ids: (batch, tokens) integers, the answers behind `first_tokens`. None: no
            more than those.
          decoder_attention_mask: (batch, tokens), as the text's.
          return_hidden: return what `unembed` makes logits of, (batch, tokens, d_model), instead.

        Returns:
          Logits (batch, tokens, vocabulary) in the parameters' dtype.

        Raises:
          ConfigError: if an argument's shape does not fit the others.
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
        """Read texts: (batch, text tokens) -> (batch, text tokens, d_model)."""
        check_inputs(input_ids, attention_mask, None, None, None)
        tokens = input_ids.shape[1]
        shared = _Shared(self.encoder.bias(tokens, tokens, None), _of_keys(attention_mask))
        return self.encoder(self.shared(input_ids), shared, None, None)[0]

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
        """Score every next token of answers to texts that were read.

        Args:
          decoder_input_ids: (batch, tokens) integers; with a cache, those behind what is in it.
          encoded: (batch, text tokens, d_model), from `encode`; with a cache, only the first call
            needs it.
          attention_mask: (batch, text tokens), that of the texts.
          decoder_attention_mask: (batch, tokens), that of the answers; with a cache (batch, cache
            length).
          cache: from `init_cache` or an earlier call; the tokens are appended to it.
          return_hidden: return what `unembed` makes logits of, (batch, tokens, d_model), instead.

        Returns:
          Logits (batch, tokens, vocabulary); with a cache `(logits, cache)`.

        Raises:
          ConfigError: if an argument's shape does not fit the others.
        """
        own = None if cache is None else KVCache(cache.keys, cache.values, cache.filled)
        check_inputs(decoder_input_ids, decoder_attention_mask, None, None, own)
        self._check_text(decoder_input_ids, encoded, attention_mask, cache)
        tokens = decoder_input_ids.shape[1]
        keys, filled = (tokens, None) if cache is None else (cache.keys.shape[2], cache.filled)
        shared = _Shared(
            bias=self.decoder.bias(tokens, keys, filled),
            mask=visible(tokens, keys, decoder_attention_mask, None, filled),
            filled=filled,
            text=encoded,
            text_mask=_of_keys(attention_mask),
        )
        memory = None if cache is None else (cache.keys, cache.values)
        text = None
        if cache is not None and cache.text_keys is not None and cache.text_values is not None:
            text = (cache.text_keys, cache.text_values)
        x, remembered = self.decoder(self.shared(decoder_input_ids), shared, memory, text)
        y = x if return_hidden else self.unembed(x)
        if cache is None:
            return y
        (keys, values), text = remembered
        return y, T5Cache(keys, values, cache.filled + jnp.int32(tokens), *text)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """The decoder's last hidden states (..., d_model) -> logits (..., vocabulary)."""
        c = self.config
        if c.scale_decoder_outputs:
            hidden = hidden * jnp.asarray(c.d_model**-0.5, hidden.dtype)
        return self.shared.attend(hidden) if c.tie_word_embeddings else self.lm_head(hidden)

    def first_tokens(self, batch: int) -> jax.Array:
        """(batch, 1) integers: the token that every answer starts with."""
        return jnp.full((batch, 1), self.config.decoder_start_token_id or 0, jnp.int32)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> T5Cache:
        """An empty cache; needs no parameters, so call it on the module itself.

        Args:
          batch: how many answers will be generated together.
          length: tokens of an answer at most, the first included.
          dtype: of keys and values; the parameters' dtype loses nothing.

        Returns:
          A `T5Cache` of zeros.
        """
        c = self.config
        shape = (c.num_decoder_layers, batch, length, c.num_heads, c.d_kv)
        return T5Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))

    def layout(self) -> Layout:
        """Where a T5's parameters stand in its files."""
        placed: Layout = {"shared/embedding": Placement(("shared.weight",), module="shared")}
        for stack in ("encoder", "decoder"):
            parts: list[tuple[str, str, tuple[str, ...]]]
            parts = [("attn", "SelfAttention", ("q", "k", "v", "o"))]
            if stack == "decoder":
                parts.append(("cross_attn", "EncDecAttention", ("q", "k", "v", "o")))
            inner = ("wi_0", "wi_1") if self.config.is_gated_act else ("wi",)
            parts.append(("mlp", "DenseReluDense", (*inner, "wo")))
            for number, (part, theirs, names) in enumerate(parts):
                layer = f"{stack}.block.{{layer}}.layer.{number}"
                for name in names:
                    placed |= dense(f"{stack}/layers/{part}/{name}", f"{layer}.{theirs}.{name}")
                placed |= vector(f"{stack}/layers/{part}_norm/scale", f"{layer}.layer_norm.weight")
            # All layers of a stack share the biases, which stand with the first.
            biases = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
            path = f"{stack}/relative_attention_bias/embedding"
            placed[path] = Placement((f"{biases}.weight",), module=biases)
            placed |= vector(f"{stack}/norm/scale", f"{stack}.final_layer_norm.weight")
        return placed if self.config.tie_word_embeddings else placed | dense("lm_head", "lm_head")

    def _check_text(
        self,
        ids: jax.Array,
        encoded: jax.Array | None,
        attention_mask: jax.Array | None,
        cache: T5Cache | None,
    ) -> None:
        kept = cache.text_keys if cache is not None else None
        known = kept.shape[1:3] if kept is not None else None
        known = encoded.shape[:2] if known is None and encoded is not None else known
        if known is None:
            got, expected = "None", "what encode returned"
            raise _refusal("encoded", got, expected, "only a cache that was used can stand for it.")
        if known[0] != ids.shape[0]:
            got, expected = f"{known[0]} texts", f"{ids.shape[0]}, one for each row of answers"
            raise _refusal("encoded", got, expected, "encode the texts of these answers.")
        if attention_mask is not None and attention_mask.shape != known:
            got, expected = f"shape {attention_mask.shape}", f"shape {known}"
            raise _refusal("attention_mask", got, expected, "give the mask of the encoded texts.")


def _refusal(where: str, got: str, expected: str, fix: str) -> ConfigError:
    return ConfigError(format_error(where, got=got, expected=expected, fix=fix))


def _linear(config: T5Config, features: int, deviation: float, param_dtype: Any) -> nn.Dense:
    initial = nn.initializers.normal(config.initializer_factor * deviation)
    return nn.Dense(features, use_bias=False, kernel_init=initial, param_dtype=param_dtype)


def _norm(config: T5Config, param_dtype: Any) -> RMSNorm:
    return RMSNorm(config.layer_norm_epsilon, param_dtype=param_dtype)


def _of_keys(attention_mask: jax.Array | None) -> jax.Array | None:
    """(batch, keys) -> (batch, 1, 1, keys) booleans."""
    return None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]


# -----------------------------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------------------------


def _settle(config: T5Config, read: Callable[[str], np.ndarray | None]) -> T5Config:
    """Whether there is a head apart is said by the files: newer ones call every T5 tied."""
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
    # Copies of the embedding, and biases that the attention to the text does not use.
    redundant=(
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
    embedding="shared/embedding",
    decodes=False,
    depth=None,
)
