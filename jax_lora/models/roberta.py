"""RoBERTa: BERT with positions counted from the padding token, and heads of its own.

Reference:
    Liu et al. (arXiv:1907.11692), section 3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_lora.models.activations import ACTIVATIONS
from jax_lora.models.attention import linear
from jax_lora.models.encoder import (
    CLASSIFICATION,
    DROPOUTS,
    MASKED_LM,
    NO_HEAD,
    Encoder,
    EncoderConfig,
    MaskedLMHead,
    encoder_fields,
    encoder_json,
    encoder_layout,
    norm_layout,
)
from jax_lora.models.family import Family
from jax_lora.models.layout import Layout, dense, vector

__all__ = ["Roberta", "RobertaConfig"]

_HEADS = {
    "RobertaForMaskedLM": MASKED_LM,
    "RobertaForSequenceClassification": CLASSIFICATION,
    "RobertaModel": NO_HEAD,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(EncoderConfig):
    """Sizes and switches of a RoBERTa, named as in Hugging Face's `RobertaConfig`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation
        or a head that is not implemented, or no padding token.

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
        known = isinstance(token, int) and not isinstance(token, bool)
        if not known or token not in range(self.vocab_size):
            expected = f"a token, from 0 to {self.vocab_size - 1}"
            fix = "positions are counted from it; give the one that rows are padded with."
            self.refuse("pad_token_id", token, expected, fix)

    @property
    def first_position(self) -> int:
        """Number of the first token's position: the one behind the padding token's."""
        return (self.pad_token_id or 0) + 1


class ClassificationHead(nn.Module):
    """The first token's hidden state through two layers to scores of classes."""

    config: RobertaConfig
    param_dtype: Any

    def setup(self):  # noqa: D102  Linen's hook
        c, dtype = self.config, self.param_dtype
        self.dense = linear(c, c.hidden_size, True, dtype)
        self.out_proj = linear(c, len(c.labels), True, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, hidden) -> (batch, labels)."""
        return self.out_proj(jnp.tanh(self.dense(x[:, 0])))


class Roberta(Encoder):
    """RoBERTa encoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    A token's position follows from the padding tokens in `input_ids` and not from the mask.

    Attributes:
      config: sizes and the head, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = RobertaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                        num_hidden_layers=2, num_attention_heads=2,
      ...                        head="sequence_classification")
      >>> model, ids = Roberta(config), jnp.array([[3, 5, 4]])
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> jax.jit(model.apply)({"params": params}, ids).shape
      (1, 2)
    """

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """Count the tokens that are no padding, from behind the padding token's own number."""
        pad = jnp.asarray(self.config.pad_token_id, input_ids.dtype)
        real = (input_ids != pad).astype(jnp.int32)  # (batch, tokens)
        return jnp.cumsum(real, axis=1) * real + pad.astype(jnp.int32)

    def make_head(self) -> None:
        """The classes, or the masked tokens."""
        c, dtype = self.config, self.param_dtype
        if c.head == CLASSIFICATION:
            self.classifier = ClassificationHead(c, dtype)
        if c.head == MASKED_LM:  # its activation is gelu, whatever the layers' is
            self.lm_head = MaskedLMHead(c, dtype, ACTIVATIONS["gelu"])

    def classify(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, hidden) -> (batch, labels)."""
        return self.classifier(x)

    def layout(self) -> Layout:
        """Where a RoBERTa's parameters stand in its files."""
        placed = encoder_layout("roberta")
        if self.config.head == CLASSIFICATION:
            placed |= dense("classifier/dense", "classifier.dense", bias=True)
            placed |= dense("classifier/out_proj", "classifier.out_proj", bias=True)
        if self.config.head == MASKED_LM:
            placed |= dense("lm_head/dense", "lm_head.dense", bias=True)
            placed |= norm_layout("lm_head/norm", "lm_head.layer_norm")
            placed |= vector("lm_head/bias", "lm_head.bias")
        return placed


def _to_json(config: RobertaConfig) -> dict[str, Any]:
    return encoder_json(config, _HEADS)


FAMILY = Family(
    model_type="roberta",
    architectures=tuple(_HEADS),
    config=RobertaConfig,
    module=Roberta,
    to_json=_to_json,
    fields=encoder_fields(_HEADS),
    neutral={"position_embedding_type": (None, "absolute")},
    harmless=DROPOUTS,
    # A buffer, and a part that none of the heads uses.
    redundant=(r"roberta\.embeddings\.position_ids", r"roberta\.pooler\..*"),
    tied_copies=(r"lm_head\.decoder\.(weight|bias)",),
    prefix="roberta.",
    embedding="embeddings/word_embeddings/embedding",
    head=None,
    head_bias="lm_head/bias",
    decodes=False,
)
