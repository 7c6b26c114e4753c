"""The skeleton of BERT and its kin: embeddings, a stack of layers under one scan, a head.

::

    logits = model.apply({"params": params}, input_ids, attention_mask, token_type_ids)

Every token sees every real token, before it and behind it. The head follows from the configuration:
scores of classes, (batch, labels), or of every token, (batch, tokens, vocabulary), or none. There
is no dropout inside; `jax_lora.dropout` acts on adapters.

Reference:
    Devlin et al., BERT (arXiv:1810.04805), section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_lora.errors import ConfigError, format_error
from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.attention import attend, linear
from jax_lora.models.decoder_inputs import check_inputs
from jax_lora.models.family import plain_json
from jax_lora.models.layout import Layout, Placement, StandsInFiles, dense, vector
from jax_lora.models.model_config import ModelConfig
from jax_lora.models.norms import LayerNorm

__all__ = [
    "CLASSIFICATION",
    "DROPOUTS",
    "MASKED_LM",
    "NO_HEAD",
    "Encoder",
    "EncoderConfig",
    "MaskedLMHead",
    "encoder_fields",
    "encoder_json",
    "encoder_layout",
    "norm",
    "norm_layout",
]

# The heads, as `EncoderConfig.head` names them.
CLASSIFICATION, MASKED_LM, NO_HEAD = "sequence_classification", "masked_lm", "none"

# Fields of `config.json` that change nothing here.
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """Sizes and switches of an encoder, named as in Hugging Face's `BertConfig`.

    Args:
      head: "sequence_classification", "masked_lm" or "none" (`config.json` says it by the class in
        its "architectures").
      labels: Names of the classes, for the first of these.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation
        or a head that is not implemented.
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

    def __post_init__(self) -> None:  # noqa: D105  checks
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        more = ("num_attention_heads", "max_position_embeddings", "type_vocab_size")
        self.check_sizes((*sizes, *more))
        self.check_positive(("layer_norm_eps",))
        self.check_choice("hidden_act", ACTIVATIONS)
        self.check_choice("head", (CLASSIFICATION, MASKED_LM, NO_HEAD))
        if self.hidden_size % self.num_attention_heads:
            expected = f"a divisor of hidden_size, {self.hidden_size}"
            fix = "give each head equally many channels."
            self.refuse("num_attention_heads", self.num_attention_heads, expected, fix)
        if self.head == MASKED_LM and not self.tie_word_embeddings:
            expected = "true for a masked language model"
            fix = "a head apart from the embedding is not implemented."
            self.refuse("tie_word_embeddings", False, expected, fix)
        names = self.labels if isinstance(self.labels, tuple) else ()
        if not names or not all(isinstance(name, str) for name in names):
            expected = "a tuple of names, one for each class from 0 up"
            self.refuse("labels", self.labels, expected, "name each class.")

    @property
    def first_position(self) -> int:
        """Number of the first token's position."""
        return 0


def norm(config: EncoderConfig, param_dtype: Any) -> LayerNorm:
    """A layer norm with the configuration's epsilon."""
    return LayerNorm(config.layer_norm_eps, param_dtype=param_dtype)


class _Embeddings(nn.Module):
    """The sum of what a token is, where it stands and which text it is of, normed."""

    config: EncoderConfig
    param_dtype: Any

    def setup(self):
        c = self.config
        self.word_embeddings = self._table(c.vocab_size)
        self.position_embeddings = self._table(c.max_position_embeddings)
        self.token_type_embeddings = self._table(c.type_vocab_size)
        self.norm = norm(c, self.param_dtype)

    def _table(self, rows: int) -> nn.Embed:
        initial = nn.initializers.normal(self.config.initializer_range)
        width, dtype = self.config.hidden_size, self.param_dtype
        return nn.Embed(rows, width, embedding_init=initial, param_dtype=dtype)

    def __call__(self, input_ids: jax.Array, positions: jax.Array, types: jax.Array) -> jax.Array:
        """Three (batch, tokens) integers -> (batch, tokens, hidden)."""
        # Linen's own lookup in a table of one row is none, and so has no place for an adapter.
        of_types = jnp.take(self.token_type_embeddings.embedding, types, axis=0)
        x = self.word_embeddings(input_ids) + of_types
        return self.norm(x + self.position_embeddings(positions))

    def attend(self, hidden: jax.Array) -> jax.Array:
        """(..., hidden) -> (..., vocabulary), by the table of tokens."""
        return self.word_embeddings.attend(hidden)


class _Attention(nn.Module):
    config: EncoderConfig
    param_dtype: Any

    def setup(self):
        width, dtype = self.config.hidden_size, self.param_dtype
        self.query = linear(self.config, width, True, dtype)
        self.key = linear(self.config, width, True, dtype)
        self.value = linear(self.config, width, True, dtype)
        self.output = linear(self.config, width, True, dtype)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x: (batch, tokens, hidden) -> the same shape."""
        heads = (*x.shape[:2], self.config.num_attention_heads, -1)
        q, k, v = (part(x).reshape(heads) for part in (self.query, self.key, self.value))
        y = attend(q, k, v, mask)  # (batch, tokens, heads, channels)
        return self.output(y.reshape(x.shape))


class _MLP(nn.Module):
    config: EncoderConfig
    param_dtype: Any

    def setup(self):
        c, dtype = self.config, self.param_dtype
        self.intermediate = linear(c, c.intermediate_size, True, dtype)
        self.output = linear(c, c.hidden_size, True, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, hidden) -> the same shape."""
        return self.output(ACTIVATIONS[self.config.hidden_act](self.intermediate(x)))


class EncoderLayer(nn.Module):
    """Attention, then the feed-forward part, each added to x and normed."""

    config: EncoderConfig
    param_dtype: Any

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.attention, self.attention_norm = _Attention(c, dtype), norm(c, dtype)
        self.mlp, self.mlp_norm = _MLP(c, dtype), norm(c, dtype)

    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """Scanned, so it returns (carry, None); x: (batch, tokens, hidden)."""
        x = self.attention_norm(x + self.attention(x, mask))
        return self.mlp_norm(x + self.mlp(x)), None


class MaskedLMHead(nn.Module):
    """A layer in front of the table of tokens, and a bias for each token."""

    config: EncoderConfig
    param_dtype: Any
    activation: Callable[[jax.Array], jax.Array]

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.dense, self.norm = linear(c, c.hidden_size, True, dtype), norm(c, dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,), dtype)

    def __call__(self, x: jax.Array, attend: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """x: (batch, tokens, hidden) -> (batch, tokens, vocabulary)."""
        logits = attend(self.norm(self.activation(self.dense(x))))
        return logits + self.bias.astype(logits.dtype)[None, None]


class Encoder(StandsInFiles, nn.Module):
    """What BERT and its kin share; an architecture's own class adds its heads.

    Attributes:
      config: sizes, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.
    """

    config: Any  # an EncoderConfig of the architecture's own class
    remat: bool = False
    param_dtype: Any = jnp.float32

    def make_head(self) -> None:
        """Make the parts of the configured head, in `setup`."""
        raise NotImplementedError

    def classify(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, hidden) -> (batch, labels)."""
        raise NotImplementedError  # an architecture's own

    def apply_head(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, hidden) -> (batch, labels) or (batch, tokens, vocabulary)."""
        if self.config.head == MASKED_LM:
            return self.lm_head(x, self.embeddings.attend)
        return self.classify(x)

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """Each token's position: its place in the row, padding or not."""
        tokens = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        return jnp.broadcast_to(tokens[None], input_ids.shape)

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.embeddings = _Embeddings(c, dtype)
        # Under scan the loop itself keeps XLA from undoing the recomputation.
        self.layers = nn.scan(
            nn.remat(EncoderLayer, prevent_cse=False) if self.remat else EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  Flax: Any will do
            length=c.num_hidden_layers,
        )(c, dtype)
        self.make_head()

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        return_hidden: bool = False,
    ) -> jax.Array:
        """Score the row, or each of its tokens.

        Args:
          input_ids: (batch, tokens) integers.
          attention_mask: (batch, tokens), 1 at real tokens and 0 at padding. None: no padding.
          token_type_ids: (batch, tokens), 0 in the first text of a pair and 1 in the second.
            None: zeros.
          return_hidden: return the last layer's hidden states, (batch, tokens, hidden), instead.

        Returns:
          (batch, labels) for a classifier, (batch, tokens, vocabulary) for a masked language model,
          (batch, tokens, hidden) without a head; in the parameters' dtype.

        Raises:
          ConfigError: if an argument's shape does not fit the others, or a row is longer than the
            model's positions.
        """
        self._check(input_ids, attention_mask, token_type_ids)
        if attention_mask is None:
            mask = jnp.ones((1, 1, 1, input_ids.shape[1]), bool)
        else:
            mask = attention_mask.astype(bool)[:, None, None, :]  # (batch, 1, 1, keys)
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.embeddings(input_ids, self.positions(input_ids), types)
        x, _ = self.layers(x, mask)  # (batch, tokens, hidden)
        return x if return_hidden or self.config.head == NO_HEAD else self.apply_head(x)

    def _check(
        self, input_ids: jax.Array, attention_mask: jax.Array | None, types: jax.Array | None
    ) -> None:
        check_inputs(input_ids, attention_mask, None, None, None)
        if types is not None and types.shape != input_ids.shape:
            got, expected = f"shape {types.shape}", f"shape {input_ids.shape}"
            raise _refusal("token_type_ids", got, expected, "give one number a token.")
        most = self.config.max_position_embeddings - self.config.first_position
        if input_ids.shape[1] > most:
            got, expected = f"rows of {input_ids.shape[1]} tokens", f"at most {most}"
            raise _refusal("input_ids", got, expected, "cut the rows; positions end there.")


def _refusal(where: str, got: str, expected: str, fix: str) -> ConfigError:
    return ConfigError(format_error(where, got=got, expected=expected, fix=fix))


# -----------------------------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------------------------


def encoder_layout(prefix: str) -> Layout:
    """Where an encoder's parameters stand in its files, all but the head's.

    Args:
      prefix: what transformers calls the encoder inside a model with a head.
    """
    placed: Layout = {}
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        module = f"{prefix}.embeddings.{name}"
        placed[f"embeddings/{name}/embedding"] = Placement((f"{module}.weight",), module=module)
    placed |= norm_layout("embeddings/norm", f"{prefix}.embeddings.LayerNorm")
    for ours, theirs in (
        ("attention/query", "attention.self.query"),
        ("attention/key", "attention.self.key"),
        ("attention/value", "attention.self.value"),
        ("attention/output", "attention.output.dense"),
        ("mlp/intermediate", "intermediate.dense"),
        ("mlp/output", "output.dense"),
    ):
        module = f"{prefix}.encoder.layer.{{layer}}.{theirs}"
        placed |= dense(f"layers/{ours}", module, bias=True)
    layer = f"{prefix}.encoder.layer.{{layer}}"
    placed |= norm_layout("layers/attention_norm", f"{layer}.attention.output.LayerNorm")
    return placed | norm_layout("layers/mlp_norm", f"{layer}.output.LayerNorm")


def norm_layout(path: str, module: str) -> Layout:
    """Place a layer norm."""
    return vector(f"{path}/scale", f"{module}.weight") | vector(f"{path}/bias", f"{module}.bias")


def encoder_fields(heads: Mapping[str, str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Make a reader of the head and its labels.

    Args:
      heads: class of transformers -> head.
    """

    def read(raw: dict[str, Any]) -> dict[str, Any]:
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

    return read


def encoder_json(config: Any, heads: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `config.json`: the head by its class, the labels as two tables.

    Args:
      config: the configuration.
      heads: class of transformers -> head, the usual one first.
    """
    fields = plain_json(config)
    head, labels = fields.pop("head"), fields.pop("labels")
    fields["architectures"] = [next(name for name, each in heads.items() if each == head)]
    if head == CLASSIFICATION:
        fields["id2label"] = {str(i): label for i, label in enumerate(labels)}
        fields["label2id"] = {label: i for i, label in enumerate(labels)}
    return fields
