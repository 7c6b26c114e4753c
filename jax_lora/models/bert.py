"""BERT and RoBERTa, each with a head for classes of texts or for masked tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_lora.models.checkpoint_model import linear
from jax_lora.models.encoder import (
    CLASSIFICATION,
    MASKED_LM,
    NO_HEAD,
    Encoder,
    EncoderConfig,
    encoder_family,
    masked_lm_layout,
)
from jax_lora.models.layout import Layout, dense
from jax_lora.storage.schema import is_integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """Configuration of a BERT, named as in Hugging Face's `BertConfig`.

    Example:
      >>> BertConfig(head="sequence_classification", labels=("bad", "good")).labels
      ('bad', 'good')
    """

    pad_token_id: int | None = 0


class Bert(Encoder):
    """BERT encoder; see `CheckpointModel` for the attributes.

    Reference:
      Devlin et al. (arXiv:1810.04805), sections 3 and 4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = BertConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                     num_hidden_layers=2, num_attention_heads=2)
      >>> model, ids = Bert(config), jnp.array([[3, 1, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]  # or jax.jit
      >>> jax.eval_shape(model.apply, {"params": params}, ids).shape
      (1, 3, 16)
    """

    def make_classifier(self) -> None:
        """Make the modules of the classification head, in `setup`."""
        c, dtype = self.config, self.param_dtype
        self.pooler = linear(c, c.hidden_size, True, dtype)
        self.classifier = linear(c, len(c.labels), True, dtype)

    def classify(self, x: jax.Array) -> jax.Array:
        """Score classes by the first token: (batch, tokens, hidden) -> (batch, labels)."""
        return self.classifier(jnp.tanh(self.pooler(x[:, 0])))

    def layout(self) -> Layout:
        """Map parameters to tensors."""
        placed = self.encoder_layout("bert")
        if self.config.head == CLASSIFICATION:
            placed |= dense("pooler", "bert.pooler.dense", bias=True)
            placed |= dense("classifier", "classifier", bias=True)
        if self.config.head == MASKED_LM:
            transform, bias = "cls.predictions.transform", "cls.predictions.bias"
            placed |= masked_lm_layout(f"{transform}.dense", f"{transform}.LayerNorm", bias)
        return placed


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(EncoderConfig):
    """Configuration of a RoBERTa, named as in Hugging Face's `RobertaConfig`.

    Raises:
      ConfigError: As `EncoderConfig`, and if the padding token is not in the vocabulary.

    Example:
      >>> RobertaConfig().first_position
      2
    """

    vocab_size: int = 50265
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:  # noqa: D105  checks
        super().__post_init__()
        token = self.pad_token_id
        if not is_integer(token) or token not in range(self.vocab_size):
            expected = f"a token, from 0 to {self.vocab_size - 1}"
            fix = "positions are counted from it; give the token that sequences are padded with."
            self.fail("pad_token_id", expected, fix)

    @property
    def first_position(self) -> int:
        """Position of the first token: one more than the padding token."""
        return (self.pad_token_id or 0) + 1


class _ClassificationHead(nn.Module):
    config: RobertaConfig
    param_dtype: Any

    def setup(self):
        c, dtype = self.config, self.param_dtype
        self.dense = linear(c, c.hidden_size, True, dtype)
        self.out_proj = linear(c, len(c.labels), True, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Score classes by the first token: (batch, tokens, hidden) -> (batch, labels)."""
        return self.out_proj(jnp.tanh(self.dense(x[:, 0])))


class Roberta(Encoder):
    """RoBERTa encoder; see `CheckpointModel` for the attributes.

    Positions are counted from the padding token: they follow from the padding tokens in `input_ids`
    and not from the mask.

    Reference:
      Liu et al. (arXiv:1907.11692), section 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = RobertaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                        num_hidden_layers=2, num_attention_heads=2,
      ...                        head="sequence_classification")
      >>> model, ids = Roberta(config), jnp.array([[3, 5, 4]])
      >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]  # or jax.jit
      >>> jax.eval_shape(model.apply, {"params": params}, ids).shape
      (1, 2)
    """

    head_activation = "gelu"  # whatever `hidden_act` is

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """Number the tokens that are not padding, from the padding token's id + 1 on."""
        pad = jnp.asarray(self.config.pad_token_id, input_ids.dtype)
        real = (input_ids != pad).astype(jnp.int32)  # (batch, tokens)
        return jnp.cumsum(real, axis=1) * real + pad.astype(jnp.int32)

    def make_classifier(self) -> None:
        """Make the modules of the classification head, in `setup`."""
        self.classifier = _ClassificationHead(self.config, self.param_dtype)

    def classify(self, x: jax.Array) -> jax.Array:
        """Score classes by the first token: (batch, tokens, hidden) -> (batch, labels)."""
        return self.classifier(x)

    def layout(self) -> Layout:
        """Map parameters to tensors."""
        placed = self.encoder_layout("roberta")
        if self.config.head == CLASSIFICATION:
            placed |= dense("classifier/dense", "classifier.dense", bias=True)
            placed |= dense("classifier/out_proj", "classifier.out_proj", bias=True)
        if self.config.head == MASKED_LM:
            placed |= masked_lm_layout("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
        return placed


ENCODERS = (
    encoder_family(
        {
            "BertForMaskedLM": MASKED_LM,
            "BertForSequenceClassification": CLASSIFICATION,
            "BertModel": NO_HEAD,
            "BertForPreTraining": MASKED_LM,  # without the head for pairs
        },
        model_type="bert",
        config=BertConfig,
        module=Bert,
        # Settings of the first implementation, which had other poolers.
        harmless=(
            *("directionality", "pooler_fc_size", "pooler_num_attention_heads"),
            *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
        ),
        # Buffers, and parts of other heads.
        redundant=(
            r"(bert\.)?embeddings\.position_ids",
            r"bert\.pooler\..*",
            r"cls\.seq_relationship\..*",
        ),
        tied_copies=(r"cls\.predictions\.decoder\.(weight|bias)",),
        prefix="bert.",
        # Names of norms in the first files.
        renames=((r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    ),
    encoder_family(
        {
            "RobertaForMaskedLM": MASKED_LM,
            "RobertaForSequenceClassification": CLASSIFICATION,
            "RobertaModel": NO_HEAD,
        },
        model_type="roberta",
        config=RobertaConfig,
        module=Roberta,
        # A buffer, and a pooler that none of the heads uses.
        redundant=(r"(roberta\.)?embeddings\.position_ids", r"roberta\.pooler\..*"),
        tied_copies=(r"lm_head\.decoder\.(weight|bias)",),
        prefix="roberta.",
    ),
)
