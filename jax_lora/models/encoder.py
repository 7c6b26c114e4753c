"""BERT-like encoders: embeddings, a stack of layers under one scan, a head.

::

    logits = model.apply({"params": params}, input_ids, attention_mask, token_type_ids)

Attention is bidirectional. The head of the configuration determines the output: logits of classes,
(batch, labels); logits of tokens, (batch, tokens, vocabulary); or hidden states. The models have no
dropout; `jax_lora.dropout` applies to adapters.

Reference:
    Devlin et al., BERT (arXiv:1810.04805), section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_lora.errors import ConfigError
from jax_lora.models.activation_sharding import activation_mesh, pin_rows
from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.attention import Attention, LayerContext
from jax_lora.models.checkpoint_model import CheckpointModel, dense_maker, linear, token_table
from jax_lora.models.decoder_inputs import check_inputs, key_mask
from jax_lora.models.family import Family, plain_json
from jax_lora.models.layer_stack import layer_stack
from jax_lora.models.layout import Layout, dense, embedding, layer_norm, vector
from jax_lora.models.mlp import MLP
from jax_lora.models.model_config import ModelConfig
from jax_lora.models.norms import LayerNorm

# The heads, as `EncoderConfig.head` names them.
CLASSIFICATION, MASKED_LM, NO_HEAD = "sequence_classification", "masked_lm", "none"

# Fields of `config.json` that do not change the outputs: the models have no dropout.
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """Configuration of an encoder, named as in Hugging Face's `BertConfig`.

    Args:
      head: "sequence_classification", "masked_lm" or "none"; in `config.json`, the class in
        "architectures" determines it.
      labels: Names of the classes, for "sequence_classification".

    Raises:
      ConfigError: If a size is not a positive integer, heads do not divide, or an activation or a
        head is not implemented.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    tie_word_embeddings: bool = True
    head: str = MASKED_LM
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    is_prefixed: bool = True
    has_pooler: bool = False

    @property
    def pools(self) -> bool:
        """Whether the model without a head has a pooler, which its outputs do not use."""
        return self.has_pooler and self.head == NO_HEAD

    def __post_init__(self) -> None:  # noqa: D105  checks
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        more = ("num_attention_heads", "max_position_embeddings", "type_vocab_size")
        self.check_sizes((*sizes, *more))
        self.check_positive(("layer_norm_eps",))
        self.check_choice("hidden_act", ACTIVATIONS)
        self.check_choice("head", (CLASSIFICATION, MASKED_LM, NO_HEAD))
        self.check_divides("num_attention_heads", "hidden_size")
        if self.head == MASKED_LM and not self.tie_word_embeddings:
            expected = "true for a masked language model"
            fix = "a head that is not tied to the embedding is not implemented."
            self.fail("tie_word_embeddings", expected, fix)
        names = self.labels if isinstance(self.labels, tuple) else ()
        if not names or not all(isinstance(name, str) for name in names):
            self.fail("labels", "a tuple of names, one for each class", "name each class.")

    @property
    def first_position(self) -> int:
        """Position of the first token."""
        return 0


def _norm(config: EncoderConfig, param_dtype: Any) -> LayerNorm:
    return LayerNorm(config.layer_norm_eps, param_dtype=param_dtype)


class _Embeddings(nn.Module):
    """The normed sum of the embeddings of token, position and segment."""

    config: EncoderConfig
    param_dtype: Any

    def setup(self):
        c, dtype, width = self.config, self.param_dtype, self.config.hidden_size
        self.word_embeddings = token_table(c, c.vocab_size, width, dtype)
        self.position_embeddings = token_table(c, c.max_position_embeddings, width, dtype)
        self.token_type_embeddings = token_table(c, c.type_vocab_size, width, dtype)
        self.norm = _norm(c, dtype)

    def __call__(self, input_ids: jax.Array, positions: jax.Array, types: jax.Array) -> jax.Array:
        """Three arrays of (batch, tokens) integers -> (batch, tokens, hidden)."""
        # Linen does not look anything up in a table of one row, so an adapter would have no effect.
        of_types = jnp.take(self.token_type_embeddings.embedding, types, axis=0)
        x = self.word_embeddings(input_ids) + of_types
        return self.norm(x + self.position_embeddings(positions))

    def attend(self, hidden: jax.Array) -> jax.Array:
        """Multiply by the token embedding: (..., hidden) -> (..., vocabulary)."""
        return self.word_embeddings.attend(hidden)


class EncoderLayer(nn.Module):
    """Attention and feed-forward block, each added to x and normed."""

    config: EncoderConfig
    param_dtype: Any

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        dense, heads = dense_maker(c, dtype), c.num_attention_heads
        names, channels = ("query", "key", "value", "output"), c.hidden_size // heads
        self.attention = Attention(dense, names, heads, heads, channels, bias=True, out_bias=True)
        names = ("intermediate", "output")
        self.mlp = MLP(dense, names, c.intermediate_size, c.hidden_act, bias=True)
        self.attention_norm, self.mlp_norm = _norm(c, dtype), _norm(c, dtype)

    def __call__(self, x: jax.Array, context: LayerContext) -> tuple[jax.Array, None]:
        """Apply the layer to x, (batch, tokens, hidden); called by `nn.scan`."""
        x = pin_rows(x)
        # Named for `remat_policy`: what the norms read.
        x = checkpoint_name(x + self.attention(x, context)[0], "attention_block")
        x = self.attention_norm(pin_rows(x))
        return self.mlp_norm(checkpoint_name(x + self.mlp(x), "mlp_block")), None


class _MaskedLMHead(nn.Module):
    """A dense layer before the token embedding, and a bias for each token."""

    config: EncoderConfig
    param_dtype: Any
    activation: Callable[[jax.Array], jax.Array]

    def setup(self):
        c, dtype = self.config, self.param_dtype
        self.dense, self.norm = linear(c, c.hidden_size, True, dtype), _norm(c, dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,), dtype)

    def __call__(self, x: jax.Array, attend: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """(batch, tokens, hidden) -> (batch, tokens, vocabulary)."""
        logits = attend(self.norm(self.activation(self.dense(x))))
        return logits + self.bias.astype(logits.dtype)[None, None]


class Encoder(CheckpointModel):
    """Base of the encoders; a subclass defines the classification head."""

    head_activation: ClassVar[str | None] = None  # of a masked language model; None: hidden_act

    def make_classifier(self) -> None:
        """Make the modules of the classification head, in `setup`."""
        raise NotImplementedError

    def classify(self, x: jax.Array) -> jax.Array:
        """Score classes: (batch, tokens, hidden) -> (batch, labels)."""
        raise NotImplementedError

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """Number the tokens from 0, padding included: (batch, tokens) int32."""
        tokens = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        return jnp.broadcast_to(tokens[None], input_ids.shape)

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.embeddings = _Embeddings(c, dtype)
        self.layers = layer_stack(EncoderLayer, c.num_hidden_layers, remat=self.remat)(c, dtype)
        if c.head == CLASSIFICATION:
            self.make_classifier()
        if c.head == MASKED_LM:
            activation = ACTIVATIONS[self.head_activation or c.hidden_act]
            self.lm_head = _MaskedLMHead(c, dtype, activation)
        if c.pools:
            self.pooler = linear(c, c.hidden_size, True, dtype)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        return_hidden: bool = False,
    ) -> jax.Array:
        """Score the sequence, or each of its tokens.

        Args:
          input_ids: (batch, tokens) integers.
          attention_mask: (batch, tokens), 1 at real tokens and 0 at padding. None: no padding.
          token_type_ids: (batch, tokens), 0 in the first text of a pair and 1 in the second.
            None: zeros.
          return_hidden: Whether to return the last hidden states, (batch, tokens, hidden), instead.

        Returns:
          (batch, labels) for a classifier, (batch, tokens, vocabulary) for a masked language model,
          (batch, tokens, hidden) without a head; in the parameters' dtype.

        Raises:
          ConfigError: If an argument's shape does not fit the others, or a sequence is longer than
            the table of positions.
        """
        self._check(input_ids, attention_mask, token_type_ids)
        if attention_mask is None:
            mask = jnp.ones((1, 1, 1, input_ids.shape[1]), bool)
        else:
            mask = key_mask(attention_mask)  # (batch, 1, 1, keys)
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.embeddings(input_ids, self.positions(input_ids), types)
        with activation_mesh(self.mesh):
            x, _ = self.layers(x, LayerContext(mask=mask))  # (batch, tokens, hidden)
            x = pin_rows(x)
        if self.config.pools and self.is_initializing():
            self.pooler(x[:, 0])
        if return_hidden or self.config.head == NO_HEAD:
            return x
        return self.unembed(x) if self.config.head == MASKED_LM else self.classify(x)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Map (batch, tokens, hidden) to logits (batch, tokens, vocabulary) of a masked LM."""
        return self.lm_head(hidden, self.embeddings.attend)

    def _check(
        self, input_ids: jax.Array, attention_mask: jax.Array | None, types: jax.Array | None
    ) -> None:
        check_inputs(input_ids, attention_mask)
        if types is not None and types.shape != input_ids.shape:
            got, expected = f"shape {types.shape}", f"shape {input_ids.shape}"
            raise ConfigError(
                "token_type_ids", got=got, expected=expected, fix="give one integer per token."
            )
        most = self.config.max_position_embeddings - self.config.first_position
        if input_ids.shape[1] > most:
            got, fix = f"sequences of {input_ids.shape[1]} tokens", "truncate the sequences."
            raise ConfigError(
                "input_ids", got=got, expected=f"at most {most}, the table of positions", fix=fix
            )

    def encoder_layout(self, prefix: str) -> Layout:
        """Place the parameters of all but the head, whose module is `prefix` in most files.

        Files of the model without a head can name its parts without the prefix.
        """
        bare = self.config.head == NO_HEAD and not self.config.is_prefixed
        prefix = "" if bare else f"{prefix}."
        placed: Layout = {}
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            placed |= embedding(f"embeddings/{name}", f"{prefix}embeddings.{name}")
        placed |= layer_norm("embeddings/norm", f"{prefix}embeddings.LayerNorm")
        layer = f"{prefix}encoder.layer.{{layer}}"
        for ours, theirs in (
            ("attention/query", "attention.self.query"),
            ("attention/key", "attention.self.key"),
            ("attention/value", "attention.self.value"),
            ("attention/output", "attention.output.dense"),
            ("mlp/intermediate", "intermediate.dense"),
            ("mlp/output", "output.dense"),
        ):
            placed |= dense(f"layers/{ours}", f"{layer}.{theirs}", bias=True)
        if self.config.pools:
            placed |= dense("pooler", f"{prefix}pooler.dense", bias=True)
        placed |= layer_norm("layers/attention_norm", f"{layer}.attention.output.LayerNorm")
        return placed | layer_norm("layers/mlp_norm", f"{layer}.output.LayerNorm")


def masked_lm_layout(dense_module: str, norm_module: str, bias: str) -> Layout:
    """Place the head of a masked language model, given its two modules and the bias's tensor."""
    placed = dense("lm_head/dense", dense_module, bias=True)
    return placed | layer_norm("lm_head/norm", norm_module) | vector("lm_head/bias", bias)


# -----------------------------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------------------------


def encoder_family(
    heads: Mapping[str, str], *, prefix: str, harmless: tuple[str, ...] = (), **more: Any
) -> Family:
    """Make the family of an encoder, with other arguments of `Family`.

    `heads` maps transformers classes to heads, the usual class first. `harmless` are fields besides
    the dropout rates.
    """
    return Family(
        architectures=tuple(heads),
        to_json=lambda config: _to_json(config, heads),
        fields=lambda raw: _fields(raw, heads),
        settle=lambda config, read: _settle(config, read, prefix),
        prefix=prefix,
        neutral={"position_embedding_type": (None, "absolute")},
        harmless=(*_DROPOUTS, *harmless),
        embedding="embeddings/word_embeddings/embedding",
        head=None,
        head_bias="lm_head/bias",
        decodes=False,
        **more,
    )


def _fields(raw: dict[str, Any], heads: Mapping[str, str]) -> dict[str, Any]:
    """Read the head from the class, and the labels from the table or their number."""
    named = [name for name in raw.get("architectures") or () if name in heads]
    found: dict[str, Any] = {"head": heads[named[0]]} if named else {}
    names, count = raw.get("id2label"), raw.get("num_labels", raw.get("_num_labels"))
    if names is not None:
        numbers = [str(i) for i in range(len(names))]
        ordered = isinstance(names, dict) and set(names) == set(numbers)
        found["labels"] = tuple(str(names[i]) for i in numbers) if ordered else names
    elif isinstance(count, int):
        found["labels"] = tuple(f"LABEL_{i}" for i in range(count))
    return found


def _settle(config: Any, read: Callable[[str], Any], prefix: str) -> Any:
    """Find out by its tensors whether a model has a pooler, and names without the prefix."""
    table, pooler = "embeddings.word_embeddings.weight", "pooler.dense.weight"
    bare = config.head == NO_HEAD and read(table) is not None
    pools = config.head == NO_HEAD and read(pooler if bare else prefix + pooler) is not None
    return dataclasses.replace(config, is_prefixed=not bare, has_pooler=pools)


def _to_json(config: Any, heads: Mapping[str, str]) -> dict[str, Any]:
    """Write the head as a class, and the labels as two tables."""
    fields = plain_json(config)
    del fields["is_prefixed"], fields["has_pooler"]  # follow from the tensors
    head, labels = fields.pop("head"), fields.pop("labels")
    fields["architectures"] = [next(name for name, each in heads.items() if each == head)]
    if head == CLASSIFICATION:
        fields["id2label"] = {str(i): label for i, label in enumerate(labels)}
        fields["label2id"] = {label: i for i, label in enumerate(labels)}
    return fields
