"""The skeleton of a decoder: embed, a stack of layers under one scan, a last norm, unembed.

Training and scoring::

    logits = model.apply({"params": params}, input_ids, attention_mask=mask)

Generation keeps each layer's keys and values in a cache, an ordinary pytree that goes in and
comes out. `attention_mask` then covers the cache's whole length: the prompt's mask (prompts of
unequal length are padded on the left) followed by ones. One call fills the prompt, each later
call adds one token::

    cache = model.init_cache(batch, length, dtype)
    logits, cache = model.apply({"params": params}, prompt, attention_mask=mask, cache=cache)
    logits, cache = model.apply(
        {"params": params}, token[:, None], attention_mask=mask, cache=cache
    )

The layers are one stack under `nn.scan`: every kernel is (layers, in, out). Arithmetic follows the
parameters' dtype; norms, rotation and softmax are float32 inside.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.models.attention import Context, Memory, linear
from jax_lora.models.decoder_config import DecoderConfig
from jax_lora.models.decoder_inputs import KVCache, check_inputs, count_positions, visible
from jax_lora.models.layout import Layout, StandsInFiles, decoder_layout
from jax_lora.models.norms import RMSNorm
from jax_lora.models.rotary import rotary_angles

__all__ = ["Decoder", "DecoderLayer"]


class DecoderLayer(nn.Module):
    """One layer of the stack; an architecture's own class has the parts and says how they join."""

    config: Any  # a DecoderConfig of the architecture's own class
    param_dtype: Any

    norm_names: ClassVar[dict[str, str]] = {}  # ours -> Hugging Face's

    def block(
        self, x: jax.Array, context: Context, memory: Memory | None
    ) -> tuple[jax.Array, Memory | None]:
        """x: (batch, tokens, hidden) -> the same shape, and the layer's cache if it has one."""
        raise NotImplementedError

    def __call__(
        self, x: jax.Array, contexts: Context, memory: Memory | None, kind: jax.Array | None
    ) -> tuple[jax.Array, Memory | None]:
        """Scanned, so it returns (carry, this layer's output).

        Args:
          x: (batch, tokens, hidden).
          contexts: What every layer shares; with several kinds of layers, stacked by kind.
          memory: The layer's cache, or None.
          kind: int32 scalar, which of the kinds this layer is; None if there is one kind only.
        """
        if kind is not None:
            filled = contexts.filled  # the same for every kind
            of_kind = contexts._replace(filled=None)
            of_this: Context = jax.tree.map(lambda each: each[kind], of_kind)
            contexts = of_this._replace(filled=filled)
        return self.block(x, contexts, memory)


class Decoder(StandsInFiles, nn.Module):
    """What the rotary decoders share; an architecture's own class adds its layer.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.
    """

    config: Any  # a DecoderConfig of the architecture's own class
    remat: bool = False
    param_dtype: Any = jnp.float32

    def layer_class(self) -> type[DecoderLayer]:
        """The architecture's layer."""
        raise NotImplementedError

    def layout(self) -> Layout:
        """Where the parameters stand in the files: under the usual names here."""
        return self.usual_layout()

    def usual_layout(self, **parts: tuple[str, ...]) -> Layout:
        """The usual names with what differs: `attention`, `mlp`, `biased` of `decoder_layout`."""
        c = self.config
        # Where an architecture has this switch, it turns on the biases of the whole attention.
        usual = {"biased": ("attn",) * getattr(c, "attention_bias", False)}
        norms = self.layer_class().norm_names
        return decoder_layout(norms=norms, tied=c.tie_word_embeddings, **(usual | parts))

    def final_norm(self) -> nn.Module:
        """The norm behind the last layer."""
        return RMSNorm(self.config.rms_norm_eps, param_dtype=self.param_dtype)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """(batch, tokens) integers -> (batch, tokens, hidden)."""
        return self.embed_tokens(input_ids)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Final hidden states (..., hidden) -> logits (..., vocabulary)."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

    def setup(self):  # noqa: D102  Linen's hook
        c = self.config
        initial = nn.initializers.normal(c.initializer_range)
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, embedding_init=initial, param_dtype=self.param_dtype
        )
        # Under scan the loop itself keeps XLA from undoing the recomputation.
        layer = self.layer_class()
        self.layers = nn.scan(
            nn.remat(layer, prevent_cse=False) if self.remat else layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]  Flax: Any will do
            length=c.num_hidden_layers,
        )(c, self.param_dtype)
        self.norm = self.final_norm()
        if not c.tie_word_embeddings:
            self.lm_head = linear(c, c.vocab_size, False, self.param_dtype)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        return_hidden: bool = False,
    ):
        """Score every next token.

        Args:
          input_ids: (batch, tokens) integers.
          attention_mask: (batch, tokens), 1 at real tokens and 0 at padding, on either side; with a
            cache (batch, cache length). None: no padding.
          positions: (batch, tokens); by default each real token counts the real ones before it.
          segment_ids: (batch, tokens); tokens see only their own segment (packed documents; give
            `positions` too, so that each document starts from 0). Not with a cache.
          cache: from `init_cache` or an earlier call; the tokens are appended to it.
          return_hidden: return the final normed hidden states (batch, tokens, hidden) in place of
            logits, for a loss that calls `unembed` on a part at a time.

        Returns:
          Logits (batch, tokens, vocabulary) in the parameters' dtype; with a cache
          `(logits, cache)`.

        Raises:
          ConfigError: if an argument's shape does not fit the others.
        """
        check_inputs(input_ids, attention_mask, positions, segment_ids, cache)
        filled = None if cache is None else cache.filled
        if positions is None:
            positions = count_positions(input_ids, attention_mask, filled)
        keys = input_ids.shape[1] if cache is None else cache.keys.shape[2]
        given = (attention_mask, segment_ids, filled)
        contexts, kinds = _contexts(self.config, positions, keys, given)
        x = self.embed(input_ids)  # (batch, tokens, hidden)
        memory = None if cache is None else (cache.keys, cache.values)
        x, memory = self.layers(x, contexts, memory, kinds)
        x = self.norm(x)
        y = x if return_hidden else self.unembed(x)
        if cache is None or memory is None:
            return y
        return y, KVCache(*memory, filled=cache.filled + jnp.int32(input_ids.shape[1]))

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> KVCache:
        """An empty cache; needs no parameters, so call it on the module itself.

        Args:
          batch: how many rows will be generated together.
          length: prompt and new tokens together, at most; under jit nobody can tell how many
            slots are filled, so a token too many overwrites the last ones.
          dtype: of keys and values; the parameters' dtype loses nothing.

        Returns:
          A `KVCache` of zeros.
        """
        c = self.config
        shape = (c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))


_Given = tuple[jax.Array | None, jax.Array | None, jax.Array | None]  # mask, segments, filled


def _contexts(
    config: DecoderConfig, positions: jax.Array, keys: int, given: _Given
) -> tuple[Context, jax.Array | None]:
    """What the layers share, stacked by kind where there are several; and each layer's kind."""
    kinds = list(dict.fromkeys(config.layer_kinds))
    attention_mask, segment_ids, filled = given
    # A window as long as the row hides nothing.
    windows = [None if k.window is None or k.window >= keys else k.window for k in kinds]
    plain = all(each is None for each in (*given, *windows))
    masks = [
        None if plain else visible(positions.shape[1], keys, attention_mask, segment_ids, filled, w)
        for w in windows
    ]
    contexts = [
        Context(*rotary_angles(kind.rope, positions), mask, None)
        for kind, mask in zip(kinds, masks, strict=True)
    ]
    if len(kinds) == 1:
        return contexts[0]._replace(filled=filled), None
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *contexts)
    numbers = np.array([kinds.index(kind) for kind in config.layer_kinds], np.int32)
    return stacked._replace(filled=filled), jnp.asarray(numbers)
