"""GPT-2: learned positions, layer norms with biases, one kernel for queries, keys and values.

Reference:
    Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_lora.errors import ConfigError
from jax_lora.models.activation_sharding import pin_rows
from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.attention import Attention, LayerCache, LayerContext
from jax_lora.models.causal_decoder import CausalDecoder
from jax_lora.models.checkpoint_model import dense_maker, linear, token_table
from jax_lora.models.decoder_inputs import MaskInputs
from jax_lora.models.family import Family, plain_json
from jax_lora.models.layer_stack import layer_stack
from jax_lora.models.layout import Layout, dense, embedding, layer_norm
from jax_lora.models.mlp import MLP
from jax_lora.models.model_config import ModelConfig
from jax_lora.models.norms import LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """Configuration of a GPT-2, named as in Hugging Face's `GPT2Config`.

    Args:
      n_inner: Width of the feed-forward block; 0: four times the hidden size.
      scale_attn_weights: Whether scores are divided by the square root of `head_dim`.
      scale_attn_by_inverse_layer_idx: Whether scores are also divided by the layer's number.
      reorder_and_upcast_attn: Kept for the files; the softmax is always float32 here.

    Raises:
      ConfigError: If a size is not a positive integer, heads do not divide, or the activation is
        not implemented.

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

    def __post_init__(self) -> None:  # noqa: D105  derives fields, then checks
        self.set_default("n_inner", 4 * self.n_embd, unset=(0, None))
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
        self.check_sizes(sizes)
        self.check_positive(("layer_norm_epsilon",))
        self.check_choice("activation_function", ACTIVATIONS)
        self.check_divides("n_head", "n_embd")

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence, by the name that other decoders have for it."""
        return self.n_positions

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.n_embd // self.n_head


class GPT2Layer(nn.Module):
    """Attention and feed-forward block, each on a normed copy of x and added to x."""

    config: GPT2Config
    param_dtype: Any

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        dense, scale = dense_maker(c, dtype), None if c.scale_attn_weights else 1.0
        self.ln_1 = LayerNorm(c.layer_norm_epsilon, param_dtype=dtype)
        self.attn = Attention(
            dense,
            ("c_attn", "c_proj"),
            c.n_head,
            c.n_head,
            c.head_dim,
            bias=True,
            out_bias=True,
            scale=scale,
        )
        self.ln_2 = LayerNorm(c.layer_norm_epsilon, param_dtype=dtype)
        self.mlp = MLP(dense, ("c_fc", "c_proj"), c.n_inner, c.activation_function, bias=True)

    def __call__(
        self,
        x: jax.Array,
        context: LayerContext,
        cache: LayerCache | None,
        number: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Apply the layer to x, (batch, tokens, hidden); called by `nn.scan`."""
        x = pin_rows(x)
        attended, cache = self.attn(self.ln_1(x), context, cache, number)
        x = checkpoint_name(pin_rows(x + attended), "attention_block")
        return x + self.mlp(self.ln_2(x)), cache


class GPT2(CausalDecoder):
    """GPT-2 decoder; see `CheckpointModel` for the attributes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2)
      >>> model, ids = GPT2(config), jnp.array([[3, 1, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]  # or jax.jit
      >>> jax.eval_shape(model.apply, {"params": params}, ids).shape
      (1, 3, 16)
    """

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.wte = token_table(c, c.vocab_size, c.n_embd, dtype)
        self.wpe = token_table(c, c.n_positions, c.n_embd, dtype)
        layers = layer_stack(GPT2Layer, c.n_layer, remat=self.remat, inputs_per_layer=2)
        self.layers = layers(c, dtype)
        self.final_norm = LayerNorm(c.layer_norm_epsilon, param_dtype=dtype, name="ln_f")
        if not c.tie_word_embeddings:
            self.lm_head = linear(c, c.vocab_size, False, dtype)

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """Layers, heads and channels of a head."""
        return self.config.n_layer, self.config.n_head, self.config.head_dim

    def check_length(self, tokens: int) -> None:
        """Raise a `ConfigError` for more tokens than there are learned positions."""
        most = self.config.n_positions
        if tokens > most:
            fix = "truncate the sequences; there are no more learned positions."
            expected = f"at most n_positions = {most}"
            raise ConfigError(
                "input_ids", got=f"sequences of {tokens} tokens", expected=expected, fix=fix
            )

    def embed(self, input_ids: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Embed tokens, and positions if given: (batch, tokens) integers -> (..., hidden)."""
        x = self.wte(input_ids)  # (batch, tokens, hidden)
        return x if positions is None else x + self.wpe(positions)

    def layer_inputs(
        self, positions: jax.Array, keys: int, given: MaskInputs, dtype: Any
    ) -> tuple[LayerContext, jax.Array | None]:
        """Make the mask, and (layers,) each layer's number, if scores are divided by it."""
        c, numbers = self.config, None
        (mask,) = self.masks(positions.shape[1], keys, given, [None], dtype)
        if c.scale_attn_by_inverse_layer_idx:
            numbers = jnp.arange(1, c.n_layer + 1, dtype=jnp.float32)
        return LayerContext(mask=mask, filled=given[-1]), numbers

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Turn final hidden states (..., hidden) into logits (..., vocabulary)."""
        tied = self.config.tie_word_embeddings
        return self.wte.attend(hidden) if tied else self.lm_head(hidden)

    def layout(self) -> Layout:
        """Map parameters to tensors; the kernels in the files are (in, out) too."""
        layer = "transformer.h.{layer}"
        placed = embedding("wte", "transformer.wte") | embedding("wpe", "transformer.wpe")
        for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
            module = f"{layer}.{name.replace('/', '.')}"
            placed |= dense(f"layers/{name}", module, bias=True, transposed=False)
        placed |= layer_norm("layers/ln_1", f"{layer}.ln_1")
        placed |= layer_norm("layers/ln_2", f"{layer}.ln_2")
        placed |= layer_norm("ln_f", "transformer.ln_f")
        return placed if self.config.tie_word_embeddings else placed | dense("lm_head", "lm_head")


def _to_json(config: GPT2Config) -> dict[str, Any]:
    # Headless models are saved with the tensor names of a model with a head.
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
        *("n_ctx", "embd_pdrop", "resid_pdrop", "attn_pdrop", "predict_special_tokens"),
        # Settings of another head.
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        "summary_first_dropout",
    ),
    redundant=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    prefix="transformer.",
    embedding="wte/embedding",
    depth="n_layer",
)
