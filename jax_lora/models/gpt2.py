"""GPT-2: learned positions, layer norms with biases, one kernel for queries, keys and values.

Reference:
    Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.3.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_lora.errors import ConfigError, format_error
from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.attention import Memory, attend, linear, remember
from jax_lora.models.decoder_inputs import KVCache, check_inputs, count_positions, visible
from jax_lora.models.family import Family, plain_json
from jax_lora.models.layout import Layout, Placement, StandsInFiles, dense, vector
from jax_lora.models.model_config import ModelConfig
from jax_lora.models.norms import LayerNorm

__all__ = ["GPT2", "GPT2Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """Sizes and switches of a GPT-2, named as in Hugging Face's `GPT2Config`.

    Args:
      n_inner: Width of the feed-forward part; 0: four times the hidden size.
      scale_attn_weights: Whether scores are divided by the root of a head's channels.
      scale_attn_by_inverse_layer_idx: Whether they are divided by the layer's number too.
      reorder_and_upcast_attn: Kept for the files; the softmax is float32 here in any case.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation
        that is not implemented.

    Example:
      >>> GPT2Config(n_embd=64, n_head=4).n_inner
      256
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 0
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:  # noqa: D105  fills in what is derived, then checks
        if not self.n_inner:
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
        self.check_sizes(sizes)
        self.check_positive(("layer_norm_epsilon",))
        self.check_choice("activation_function", ACTIVATIONS)
        if self.n_embd % self.n_head:
            fix = "give each head equally many channels."
            self.refuse("n_head", self.n_head, f"a divisor of n_embd, {self.n_embd}", fix)

    @property
    def max_position_embeddings(self) -> int:
        """The longest row, by the name that other decoders have for it."""
        return self.n_positions

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.n_embd // self.n_head


class _Shared(NamedTuple):
    """What every layer gets alike."""

    mask: jax.Array | None  # (batch or 1, 1, tokens, keys) booleans; None: plainly causal
    filled: jax.Array | None  # int32 scalar; None without a cache


class _Attention(nn.Module):
    config: GPT2Config
    param_dtype: Any

    def setup(self):
        c = self.config
        self.c_attn = linear(c, 3 * c.n_embd, True, self.param_dtype)
        self.c_proj = linear(c, c.n_embd, True, self.param_dtype)

    def __call__(
        self, x: jax.Array, shared: _Shared, memory: Memory | None, number: jax.Array | None
    ) -> tuple[jax.Array, Memory | None]:
        """x: (batch, tokens, hidden) -> the same shape, and the layer's cache if it has one."""
        c = self.config
        qkv = self.c_attn(x)  # (batch, tokens, 3 * hidden)
        heads = (*x.shape[:2], c.n_head, c.head_dim)
        q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))  # (b, t, h, d)
        if number is not None:  # dividing queries divides their scores
            q = q / number.astype(q.dtype)
        if memory is not None and shared.filled is not None:
            memory = remember(memory, k, v, shared.filled)
            k, v = (part.astype(x.dtype) for part in memory)  # (b, length, h, d)
        scale = None if c.scale_attn_weights else 1.0
        y = attend(q, k, v, shared.mask, scale=scale)
        return self.c_proj(y.reshape(x.shape)), memory


class _MLP(nn.Module):
    config: GPT2Config
    param_dtype: Any

    def setup(self):
        c = self.config
        self.c_fc = linear(c, c.n_inner, True, self.param_dtype)
        self.c_proj = linear(c, c.n_embd, True, self.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, hidden) -> the same shape."""
        return self.c_proj(ACTIVATIONS[self.config.activation_function](self.c_fc(x)))


class GPT2Layer(nn.Module):
    """Attention, then the feed-forward part, each on a normed copy of x."""

    config: GPT2Config
    param_dtype: Any

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.ln_1 = LayerNorm(c.layer_norm_epsilon, param_dtype=dtype)
        self.attn = _Attention(c, dtype)
        self.ln_2 = LayerNorm(c.layer_norm_epsilon, param_dtype=dtype)
        self.mlp = _MLP(c, dtype)

    def __call__(
        self, x: jax.Array, shared: _Shared, memory: Memory | None, number: jax.Array | None
    ) -> tuple[jax.Array, Memory | None]:
        """Scanned, so it returns (carry, this layer's output); x: (batch, tokens, hidden)."""
        attended, memory = self.attn(self.ln_1(x), shared, memory, number)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), memory


class GPT2(StandsInFiles, nn.Module):
    """GPT-2 decoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Called as every decoder of this package is, for training and, with a cache, for generation.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2)
      >>> model, ids = GPT2(config), jnp.array([[3, 1, 4]])
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> jax.jit(model.apply)({"params": params}, ids).shape
      (1, 3, 16)
    """

    config: GPT2Config
    remat: bool = False
    param_dtype: Any = jnp.float32

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        initial = nn.initializers.normal(c.initializer_range)
        self.wte = nn.Embed(c.vocab_size, c.n_embd, embedding_init=initial, param_dtype=dtype)
        self.wpe = nn.Embed(c.n_positions, c.n_embd, embedding_init=initial, param_dtype=dtype)
        # Under scan the loop itself keeps XLA from undoing the recomputation.
        self.layers = nn.scan(
            nn.remat(GPT2Layer, prevent_cse=False) if self.remat else GPT2Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]  Flax: Any will do
            length=c.n_layer,
        )(c, dtype)
        self.ln_f = LayerNorm(c.layer_norm_epsilon, param_dtype=dtype)
        if not c.tie_word_embeddings:
            self.lm_head = linear(c, c.vocab_size, False, dtype)

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
            cache (batch, cache length). None: no padding. More real tokens than the model has
            positions give NaN.
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
          ConfigError: if an argument's shape does not fit the others, or a row is longer than the
            model's positions.
        """
        check_inputs(input_ids, attention_mask, positions, segment_ids, cache)
        filled = None if cache is None else cache.filled
        if positions is None:
            if attention_mask is None and cache is None:  # else padding may take none
                self._check_length(input_ids.shape[1])
            positions = count_positions(input_ids, attention_mask, filled)
        shared = self._shared(input_ids, attention_mask, segment_ids, cache)
        memory = None if cache is None else (cache.keys, cache.values)
        x = self.wte(input_ids) + self.wpe(positions)  # (batch, tokens, hidden)
        x, memory = self.layers(x, shared, memory, self._numbers())
        x = self.ln_f(x)
        y = x if return_hidden else self.unembed(x)
        if cache is None or memory is None:
            return y
        return y, KVCache(*memory, filled=cache.filled + jnp.int32(input_ids.shape[1]))

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Final hidden states (..., hidden) -> logits (..., vocabulary)."""
        if self.config.tie_word_embeddings:
            return self.wte.attend(hidden)
        return self.lm_head(hidden)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> KVCache:
        """An empty cache; needs no parameters, so call it on the module itself.

        Args:
          batch: how many rows will be generated together.
          length: prompt and new tokens together, at most.
          dtype: of keys and values; the parameters' dtype loses nothing.

        Returns:
          A `KVCache` of zeros.
        """
        c = self.config
        shape = (c.n_layer, batch, length, c.n_head, c.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))

    def layout(self) -> Layout:
        """Where a GPT-2's parameters stand in its files, whose kernels are (in, out) like ours."""
        placed: Layout = {}
        for name in ("wte", "wpe"):
            module = f"transformer.{name}"
            placed[f"{name}/embedding"] = Placement((f"{module}.weight",), module=module)
        for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
            module = "transformer.h.{layer}." + name.replace("/", ".")
            placed |= dense(f"layers/{name}", module, bias=True, transposed=False)
        for ours, theirs in (
            ("layers/ln_1", "transformer.h.{layer}.ln_1"),
            ("layers/ln_2", "transformer.h.{layer}.ln_2"),
            ("ln_f", "transformer.ln_f"),
        ):
            placed |= vector(f"{ours}/scale", f"{theirs}.weight")
            placed |= vector(f"{ours}/bias", f"{theirs}.bias")
        return placed if self.config.tie_word_embeddings else placed | dense("lm_head", "lm_head")

    def _check_length(self, tokens: int) -> None:
        if tokens > self.config.n_positions:
            raise ConfigError(
                format_error(
                    "input_ids",
                    got=f"rows of {tokens} tokens",
                    expected=f"at most n_positions = {self.config.n_positions}",
                    fix="cut the rows; learned positions end there.",
                )
            )

    def _shared(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        segment_ids: jax.Array | None,
        cache: KVCache | None,
    ) -> _Shared:
        if cache is None and attention_mask is None and segment_ids is None:
            return _Shared(None, None)
        tokens = input_ids.shape[1]
        keys, filled = (tokens, None) if cache is None else (cache.keys.shape[2], cache.filled)
        return _Shared(visible(tokens, keys, attention_mask, segment_ids, filled), filled)

    def _numbers(self) -> jax.Array | None:
        """Each layer's number, from 1, where scores are divided by it."""
        if not self.config.scale_attn_by_inverse_layer_idx:
            return None
        return jnp.arange(1, self.config.n_layer + 1, dtype=jnp.float32)


def _to_json(config: GPT2Config) -> dict[str, Any]:
    # Files of the headless model are written with the head's names, so they say so.
    fields = {"architectures": ["GPT2LMHeadModel"], **plain_json(config)}
    if config.n_inner == 4 * config.n_embd:
        fields["n_inner"] = None
    return fields


FAMILY = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    config=GPT2Config,
    module=GPT2,
    to_json=_to_json,
    harmless=(
        *("n_ctx", "embd_pdrop", "resid_pdrop", "attn_pdrop"),
        # Of another head.
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        "summary_first_dropout",
    ),
    redundant=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    prefix="transformer.",
    embedding="wte/embedding",
    depth="n_layer",
)
