"""The interface of all decoders: score every next token, with or without a KV cache.

Training and scoring::

    logits = model.apply({"params": params}, input_ids, attention_mask=mask)

Generation keeps the keys and values of all layers in a KV cache, a pytree. Every call takes the
cache as an argument and returns the updated one. The first call adds the tokens of the prompt, and
each later call adds one token. `attention_mask` then has the length of the cache: the prompt's mask
(prompts of unequal length are padded on the left), followed by ones::

    cache = model.init_cache(batch, length, dtype)
    logits, cache = model.apply({"params": params}, prompt, attention_mask=mask, cache=cache)
    logits, cache = model.apply(
        {"params": params}, token[:, None], attention_mask=mask, cache=cache
    )
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.models.activation_sharding import activation_mesh, pin_rows
from jax_lora.models.attention import LayerContext
from jax_lora.models.attention_mask import AttentionMask, choose_kernel, make_masks
from jax_lora.models.checkpoint_model import CheckpointModel
from jax_lora.models.decoder_inputs import (
    KVCache,
    MaskInputs,
    check_inputs,
    count_positions,
    empty_cache,
)
from jax_lora.transform.strategies import target_platform


class CausalDecoder(CheckpointModel):
    """Base of the decoders; a subclass makes `layers` and `final_norm` in its `setup`."""

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """Layers, key-value heads and channels of a head."""
        raise NotImplementedError

    def check_length(self, tokens: int) -> None:
        """Raise a `ConfigError` for more tokens than there are learned positions, if any."""

    def embed(self, input_ids: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Embed tokens: (batch, tokens) integers -> (batch, tokens, hidden)."""
        raise NotImplementedError

    def layer_inputs(
        self, positions: jax.Array, keys: int, given: MaskInputs, dtype: Any
    ) -> tuple[LayerContext, jax.Array | None]:
        """Make the inputs that all layers share, and the input of each layer, (layers, ...).

        `positions` are (batch, tokens), `keys` is the number of keys (with a cache, its length),
        and `given` are as in `make_masks`.
        """
        raise NotImplementedError

    def masks(
        self,
        tokens: int,
        keys: int,
        given: MaskInputs,
        windows: Sequence[int | None],
        dtype: Any,
        soft_cap: float | None = None,
    ) -> list[AttentionMask]:
        """Make the mask of each window, for the attention kernel of this model and device."""
        kernel = choose_kernel(
            self.attention,
            self.platform or target_platform(()),
            dtype=dtype,
            head_dim=self.cache_sizes[2],
            tokens=tokens,
            cached=given[2] is not None,
            windows=len(windows),
            soft_cap=soft_cap,
        )
        return make_masks(kernel, tokens, keys, given, windows, dtype, self.mesh)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Turn final hidden states (..., hidden) into logits (..., vocabulary)."""
        raise NotImplementedError

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        return_hidden: bool = False,
    ) -> Any:
        """Score every next token.

        Args:
          input_ids: (batch, tokens) integers.
          attention_mask: (batch, tokens), 1 at real tokens and 0 at padding, on either side; with a
            cache (batch, cache length). None: no padding.
          positions: (batch, tokens); by default, the number of real tokens before each token. The
            outputs at a position beyond the table of learned positions are NaN.
          segment_ids: (batch, tokens), for packed documents: tokens attend to their own segment
            only. Give `positions` too, so that each document starts from 0. Not with a cache.
          cache: From `init_cache` or an earlier call; the tokens are appended to it.
          return_hidden: Whether to return the final normed hidden states (batch, tokens, hidden)
            instead of logits, for a loss that calls `unembed` on one part at a time.

        Returns:
          Logits (batch, tokens, vocabulary) in the parameters' dtype; with a cache
          `(logits, cache)`.

        Raises:
          ConfigError: If an argument's shape does not fit the others, or sequences without
            `attention_mask`, `positions` and `cache` are longer than the table of learned
            positions.
        """
        check_inputs(input_ids, attention_mask, positions, segment_ids, cache)
        tokens = input_ids.shape[1]
        keys, filled = (tokens, None) if cache is None else (cache.keys.shape[2], cache.filled)
        if positions is None:
            # With a mask or a cache, the number of real tokens is not known here: under jit it
            # depends on values.
            if attention_mask is None and cache is None:
                self.check_length(tokens)
            positions = count_positions(input_ids, attention_mask, filled)
        given = (attention_mask, segment_ids, filled)
        x = self.embed(input_ids, positions)  # (batch, tokens, hidden)
        context, per_layer = self.layer_inputs(positions, keys, given, x.dtype)
        layer_caches = None if cache is None else (cache.keys, cache.values)
        with activation_mesh(self.mesh):
            x, layer_caches = self.layers(pin_rows(x), context, layer_caches, per_layer)
            x = self.final_norm(pin_rows(x))
        y = x if return_hidden else self.unembed(x)
        if cache is None or layer_caches is None:
            return y
        return y, KVCache(*layer_caches, filled=cache.filled + jnp.int32(tokens))

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> KVCache:
        """Make an empty KV cache. Call it as `model.init_cache(...)`, without `apply`.

        Args:
          batch: Number of sequences that are generated together.
          length: Maximum length of a sequence: prompt and new tokens together. Tokens beyond it
            overwrite the last slots without an error, because under jit the number of filled slots
            is not known.
          dtype: Dtype of keys and values; with the parameters' dtype nothing is rounded.

        Returns:
          A `KVCache` of zeros.
        """
        layers, heads, channels = self.cache_sizes
        return empty_cache((layers, batch, length, heads, channels), dtype)
