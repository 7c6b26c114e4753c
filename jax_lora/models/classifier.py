"""A classifier of texts made of an encoder that was trained for something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_lora.errors import ModelError, format_error
from jax_lora.models.encoder import CLASSIFICATION, Encoder
from jax_lora.models.parameter_shapes import parameter_shapes

__all__ = ["add_classifier"]


def add_classifier(
    key: jax.Array, model: Any, params: Mapping[str, Any], labels: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """Put a new head for classes of texts onto an encoder, in place of the one it has.

    Use it to fine-tune a masked language model as a classifier. The head starts random, so train it
    whole: `modules_to_save=("classifier",)` for RoBERTa, `("pooler", "classifier")` for BERT.

    Args:
      key: what the head's first values are drawn with.
      model: a BERT or RoBERTa of this package.
      params: its parameters.
      labels: names of the classes, in the order of their numbers.

    Returns:
      The classifier and its parameters; the encoder's are the same arrays.

    Raises:
      ModelError: if the model is no encoder.
      ConfigError: if there are no labels, or one is no text.

    Example:
      >>> from jax_lora.models import Roberta, RobertaConfig
      >>> config = RobertaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
      ...                        num_hidden_layers=2, num_attention_heads=2)
      >>> model, ids = Roberta(config), jnp.array([[3, 5, 4]])
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> model, params = add_classifier(jax.random.key(1), model, params, ["no", "yes"])
      >>> jax.eval_shape(model.apply, {"params": params}, ids).shape
      (1, 2)
    """
    if not isinstance(model, Encoder):
        raise ModelError(
            format_error(
                "add_classifier",
                got=f"a {type(model).__name__}",
                expected="an encoder: BERT or RoBERTa",
                fix="a decoder has no token that stands for the whole row.",
            )
        )
    config = dataclasses.replace(model.config, head=CLASSIFICATION, labels=tuple(labels))
    classifier = model.clone(config=config)
    shapes = parameter_shapes(classifier)
    flat: dict[str, Any] = flatten_dict(dict(params), sep="/")
    missing = {path for path, shape in shapes.items() if not _fits(flat.get(path), shape)}
    missing |= {path for path in shapes if path.split("/")[0] == "classifier"}
    made = {**flat, **jax.jit(_draw, static_argnums=(0, 1))(classifier, frozenset(missing), key)}
    return classifier, unflatten_dict({path: made[path] for path in shapes}, sep="/")


def _fits(leaf: Any, shape: tuple[int, ...]) -> bool:
    return leaf is not None and tuple(leaf.shape) == shape


def _draw(model: Encoder, paths: frozenset[str], key: jax.Array) -> dict[str, jax.Array]:
    """Some of the first values of a model; under jit, the others are never made."""
    params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    return {path: flat[path] for path in paths}
