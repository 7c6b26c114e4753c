"""Replace an encoder's head by a new classification head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_lora.errors import ModelError
from jax_lora.models.encoder import CLASSIFICATION, Encoder
from jax_lora.models.parameter_shapes import parameter_shapes


def add_classifier(
    key: jax.Array, model: Any, params: Mapping[str, Any], labels: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """Replace an encoder's head by a new classification head.

    Use it to fine-tune a masked language model as a classifier. The head is initialized randomly,
    so train all of it: `modules_to_save=("classifier",)` for RoBERTa, `("pooler", "classifier")`
    for BERT.

    Args:
      key: A key for the head's initial parameters.
      model: A BERT or RoBERTa of this package.
      params: Its parameters.
      labels: Names of the classes, in order.

    Returns:
      The classifier and its parameters; the encoder's are the same arrays.

    Raises:
      ModelError: If the model is not an encoder.
      ConfigError: If there are no labels, or one is not a string.

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
        got, expected = f"a {type(model).__name__}", "an encoder: BERT or RoBERTa"
        raise ModelError("add_classifier", got=got, expected=expected, fix="load an encoder.")
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
    """Initialize some of a model's parameters; under jit, the others are never computed."""
    params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    return {path: flat[path] for path in paths}
