"""BERT, with a head for classes of texts or for masked tokens.

Reference:
    Devlin et al. (arXiv:1810.04805), sections 3 and 4.
"""

from __future__ import annotations

import dataclasses
from typing import Any

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

__all__ = ["Bert", "BertConfig"]

_HEADS = {
    "BertForMaskedLM": MASKED_LM,
    "BertForSequenceClassification": CLASSIFICATION,
    "BertModel": NO_HEAD,
    "BertForPreTraining": MASKED_LM,  # its other head, for pairs of sentences, is left aside
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """Sizes and switches of a BERT, named as in Hugging Face's `BertConfig`.

    Raises:
      ConfigError: for a size that is no positive integer, heads that do not divide, an activation
        or a head that is not implemented.

    Example:
      >>> BertConfig(head="sequence_classification", labels=("bad", "good")).labels
      ('bad', 'good')
    """

    pad_token_id: int | None = 0


class Bert(Encoder):
    """BERT encoder; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: sizes and the head, in Hugging Face's terms.
      remat: recompute each layer's activations in the backward pass, to save memory.
      param_dtype: dtype that `init` gives the parameters; `apply` follows what it is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = BertConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                     num_hidden_layers=2, num_attention_heads=2)
      >>> model, ids = Bert(config), jnp.array([[3, 1, 4]])
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> jax.jit(model.apply)({"params": params}, ids).shape
      (1, 3, 16)
    """

    def make_head(self) -> None:
        """A pooler and the classes, or the masked tokens."""
        c, dtype = self.config, self.param_dtype
        if c.head == CLASSIFICATION:
            self.pooler = linear(c, c.hidden_size, True, dtype)
            self.classifier = linear(c, len(c.labels), True, dtype)
        if c.head == MASKED_LM:
            self.lm_head = MaskedLMHead(c, dtype, ACTIVATIONS[c.hidden_act])

    def classify(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, hidden) -> (batch, labels)."""
        pooled = jnp.tanh(self.pooler(x[:, 0]))  # the first token stands for the row
        return self.classifier(pooled)

    def layout(self) -> Layout:
        """Where a BERT's parameters stand in its files."""
        placed = encoder_layout("bert")
        if self.config.head == CLASSIFICATION:
            placed |= dense("pooler", "bert.pooler.dense", bias=True)
            placed |= dense("classifier", "classifier", bias=True)
        if self.config.head == MASKED_LM:
            transform = "cls.predictions.transform"
            placed |= dense("lm_head/dense", f"{transform}.dense", bias=True)
            placed |= norm_layout("lm_head/norm", f"{transform}.LayerNorm")
            placed |= vector("lm_head/bias", "cls.predictions.bias")
        return placed


def _to_json(config: BertConfig) -> dict[str, Any]:
    return encoder_json(config, _HEADS)


FAMILY = Family(
    model_type="bert",
    architectures=tuple(_HEADS),
    config=BertConfig,
    module=Bert,
    to_json=_to_json,
    fields=encoder_fields(_HEADS),
    neutral={"position_embedding_type": (None, "absolute")},
    harmless=(
        *DROPOUTS,
        # Of the first implementation, whose pooler could be another.
        *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
        *("pooler_size_per_head", "pooler_type"),
    ),
    # Buffers, and what other heads have.
    redundant=(
        r"bert\.embeddings\.position_ids",
        r"bert\.pooler\..*",
        r"cls\.seq_relationship\..*",
    ),
    tied_copies=(r"cls\.predictions\.decoder\.(weight|bias)",),
    prefix="bert.",
    # The first BERTs' norms have these names.
    renames=((r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    embedding="embeddings/word_embeddings/embedding",
    head=None,
    head_bias="lm_head/bias",
    decodes=False,
)
