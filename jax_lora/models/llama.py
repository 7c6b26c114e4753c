"""A Llama decoder in Flax Linen: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

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

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jax_lora.models.decoder_inputs import KVCache, check_inputs, count_positions, visible
from jax_lora.models.hf_names import kernel_names
from jax_lora.models.llama_config import LlamaConfig
from jax_lora.models.rotary import apply_rotary, rotary_angles

__all__ = ["Llama", "parameter_shapes"]


# One layer's keys and values, (batch, length, key-value heads, head_dim) each.
_Memory = tuple[jax.Array, jax.Array]


class RMSNorm(nn.Module):
    """Divide by the root mean square over channels, then scale each channel."""

    eps: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x: (..., channels)."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)  # (..., 1)
        normed = (wide * jax.lax.rsqrt(power + jnp.float32(self.eps))).astype(x.dtype)
        return normed * jnp.broadcast_to(scale.astype(x.dtype), normed.shape)


def _linear(config: LlamaConfig, features: int, bias: bool, param_dtype: Any) -> nn.Dense:
    initial = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, use_bias=bias, kernel_init=initial, param_dtype=param_dtype)


class _Attention(nn.Module):
    config: LlamaConfig
    param_dtype: Any

    def setup(self):
        c = self.config
        bias = c.attention_bias
        groups = c.num_key_value_heads
        self.q_proj = _linear(c, c.num_attention_heads * c.head_dim, bias, self.param_dtype)
        self.k_proj = _linear(c, groups * c.head_dim, bias, self.param_dtype)
        self.v_proj = _linear(c, groups * c.head_dim, bias, self.param_dtype)
        self.o_proj = _linear(c, c.hidden_size, bias, self.param_dtype)

    def __call__(
        self, x: jax.Array, context: "_Context", memory: _Memory | None
    ) -> tuple[jax.Array, _Memory | None]:
        """x: (batch * tokens, hidden) -> the same shape, and the layer's cache if it has one."""
        batch, tokens, _ = context.cos.shape
        heads = (batch, tokens, -1, self.config.head_dim)
        q = apply_rotary(self.q_proj(x).reshape(heads), context.cos, context.sin)  # (b, t, h, d)
        k = apply_rotary(self.k_proj(x).reshape(heads), context.cos, context.sin)  # (b, t, g, d)
        v = self.v_proj(x).reshape(heads)  # (b, t, g, d)
        if memory is not None and context.filled is not None:
            memory = _write(memory, k, v, context.filled)
            k, v = (part.astype(x.dtype) for part in memory)  # (b, length, g, d)
        # Its own promotion of bfloat16 scores to float32 is refused by strict dtype promotion.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(
                q, k, v, mask=context.mask, is_causal=context.mask is None
            )  # (b, t, h, d)
        return self.o_proj(y.reshape(batch * tokens, -1)), memory


def _write(memory: _Memory, k: jax.Array, v: jax.Array, filled: jax.Array) -> _Memory:
    keys, values = memory
    zero = jnp.zeros_like(filled)
    start = (zero, filled, zero, zero)
    keys = jax.lax.dynamic_update_slice(keys, k.astype(keys.dtype), start)
    values = jax.lax.dynamic_update_slice(values, v.astype(values.dtype), start)
    return keys, values


class _SwiGLU(nn.Module):
    config: LlamaConfig
    param_dtype: Any

    def setup(self):
        c = self.config
        self.gate_proj = _linear(c, c.intermediate_size, c.mlp_bias, self.param_dtype)
        self.up_proj = _linear(c, c.intermediate_size, c.mlp_bias, self.param_dtype)
        self.down_proj = _linear(c, c.hidden_size, c.mlp_bias, self.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class _Context(NamedTuple):
    """What every layer shares: rotation, which keys a query may see, where the cache stands."""

    cos: jax.Array  # (batch, tokens, head_dim / 2)
    sin: jax.Array
    mask: jax.Array | None  # (batch, 1, tokens, keys) booleans; None: plainly causal
    filled: jax.Array | None  # int32 scalar; None without a cache


class _Layer(nn.Module):
    config: LlamaConfig
    param_dtype: Any

    def setup(self):
        eps = self.config.rms_norm_eps
        self.input_norm = RMSNorm(eps, self.param_dtype)
        self.attn = _Attention(self.config, self.param_dtype)
        self.post_attention_norm = RMSNorm(eps, self.param_dtype)
        self.mlp = _SwiGLU(self.config, self.param_dtype)

    def __call__(
        self, x: jax.Array, context: _Context, memory: _Memory | None
    ) -> tuple[jax.Array, _Memory | None]:
        """x: (batch * tokens, hidden); scanned, so it returns (carry, this layer's output)."""
        attended, memory = self.attn(self.input_norm(x), context, memory)
        x = x + attended
        return x + self.mlp(self.post_attention_norm(x)), memory


class Llama(nn.Module):
    """Llama decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                      num_hidden_layers=2, num_attention_heads=2)
      >>> model, ids = Llama(config), jnp.array([[3, 1, 4]])
      >>> params = model.init(jax.random.key(0), ids)["params"]
      >>> model.apply({"params": params}, ids).shape
      (1, 3, 16)
    """

    config: LlamaConfig
    remat: bool = False
    param_dtype: Any = jnp.float32

    def setup(self):  # noqa: D102  Linen's hook
        c = self.config
        initial = nn.initializers.normal(c.initializer_range)
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, embedding_init=initial, param_dtype=self.param_dtype
        )
        # Under scan the loop itself keeps XLA from undoing the recomputation.
        layer = nn.remat(_Layer, prevent_cse=False) if self.remat else _Layer
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]  Flax: Any will do
            length=c.num_hidden_layers,
        )(c, self.param_dtype)
        self.norm = RMSNorm(c.rms_norm_eps, self.param_dtype)
        if not c.tie_word_embeddings:
            self.lm_head = _linear(c, c.vocab_size, False, self.param_dtype)

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
        context = self._context(input_ids, attention_mask, positions, segment_ids, cache)
        # Tokens of all rows in one axis: 2-D products are what XLA's CPU backward is fastest at.
        x = self.embed_tokens(input_ids.reshape(-1))  # (batch * tokens, hidden)
        memory = None if cache is None else (cache.keys, cache.values)
        x, memory = self.layers(x, context, memory)
        x = self.norm(x)
        y = x if return_hidden else self.unembed(x)
        y = y.reshape(*input_ids.shape, -1)  # (batch, tokens, vocabulary or hidden)
        if cache is None or memory is None:
            return y
        return y, KVCache(*memory, filled=cache.filled + jnp.int32(input_ids.shape[1]))

    @property
    def hf_names(self) -> dict[str, str]:
        """Kernel path in the parameters -> Hugging Face module, "{layer}" where it is stacked."""
        return kernel_names(self.config)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Final hidden states (..., hidden) -> logits (..., vocabulary)."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

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

    def _context(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        cache: KVCache | None,
    ) -> _Context:
        filled = None if cache is None else cache.filled
        if positions is None:
            positions = count_positions(input_ids, attention_mask, filled)
        mask = None
        if attention_mask is not None or segment_ids is not None or cache is not None:
            keys = input_ids.shape[1] if cache is None else cache.keys.shape[2]
            mask = visible(input_ids.shape[1], keys, attention_mask, segment_ids, filled)
        cos, sin = rotary_angles(self.config, positions)
        return _Context(cos, sin, mask, filled)


def parameter_shapes(model: Llama) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, in the order of the paths; allocates nothing."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    flat: dict[str, Any] = flatten_dict(shapes["params"], sep="/")
    return {path: flat[path].shape for path in sorted(flat)}
