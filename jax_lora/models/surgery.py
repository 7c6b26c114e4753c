"""Another model made of a model's parameters: untied, of repeated layers, of another vocabulary.

Adapters from elsewhere are made for such models: an adapter on one end of a tied embedding, a stack
with layers repeated, added tokens. The model changes first; then the adapter fits it.
`jl.peft.load_model` calls these functions as a PEFT adapter needs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_lora.errors import ModelError, format_error
from jax_lora.models.families import family_of

__all__ = ["replicate_layers", "resize_vocab", "untie"]

_Params = Mapping[str, Any]


def untie(model: Any, params: _Params) -> tuple[Any, dict[str, Any]]:
    """Give a model whose embedding is its output head too a head of its own, of the same numbers.

    Use it before an adapter that changes only one of the two, and before merging such an adapter:
    in a tied model the other end would change with it.

    Args:
      model: a decoder of this package.
      params: its parameters.

    Returns:
      The model with its configuration's `tie_word_embeddings` off, and parameters with a head. They
      compute exactly what they did.

    Raises:
      ModelError: if the model is not tied, or has no head of its own when untied.

    Example:
      >>> import jax_lora as jl
      >>> from jax_lora.bundled import model_path
      >>> model, params = jl.models.load(model_path())
      >>> model.config.tie_word_embeddings
      True
      >>> untied, params = untie(model, params)
      >>> untied.hf_names["lm_head/kernel"]
      'lm_head'
    """
    family = family_of(model)
    if not getattr(model.config, "tie_word_embeddings", False) or family.head is None:
        raise _refusal(
            "untie", f"a {type(model).__name__} without a tied output head", "a tied decoder"
        )
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    flat: dict[str, Any] = flatten_dict(dict(params), sep="/")
    flat[family.head] = jnp.asarray(
        flat[family.embedding]
    ).T  # (vocabulary, hidden) -> its transpose
    return model.clone(config=config), unflatten_dict(flat, sep="/")


def replicate_layers(
    model: Any, params: _Params, ranges: Sequence[Sequence[int]]
) -> tuple[Any, dict[str, Any]]:
    """Build a deeper model from a model's layers, some of them several times.

    Args:
      model: a decoder of this package.
      params: its parameters.
      ranges: `[start, stop)` of the layers to put one behind the other, as PEFT's
        `layer_replication` gives them.

    Returns:
      The deeper model and its parameters. Repeated layers are copies: each can have an adapter, and
      be merged with it, on its own.

    Raises:
      ModelError: if a range is none of the model's layers, or the model is no single stack.

    Example:
      >>> import jax_lora as jl
      >>> from jax_lora.bundled import model_path
      >>> model, params = jl.models.load(model_path())
      >>> deeper, params = replicate_layers(model, params, [[0, 3], [1, 4]])
      >>> params["layers"]["attn"]["q_proj"]["kernel"].shape[0]
      6
    """
    name = family_of(model).depth
    if name is None:
        got = f"a {type(model).__name__}, whose layers are two stacks"
        raise _refusal("replicate_layers", got, "a model with one stack of layers")
    depth = getattr(model.config, name)
    for each in ranges:
        if len(each) != 2 or not 0 <= each[0] < each[1] <= depth:
            got, expected = f"the range {list(each)}", f"[start, stop) within the {depth} layers"
            raise _refusal("replicate_layers", got, expected)
    order = [layer for start, stop in ranges for layer in range(start, stop)]
    if not order:
        raise _refusal("replicate_layers", "no range", "at least one [start, stop)")
    changes = {name: len(order), **_per_layer(model.config, order)}
    config = dataclasses.replace(model.config, **changes)
    layers = jax.tree.map(lambda leaf: leaf[jnp.array(order, jnp.int32)], params["layers"])
    return model.clone(config=config), {**params, "layers": layers}


def _per_layer(config: Any, order: Sequence[int]) -> dict[str, Any]:
    """The settings that have a value for each layer, in the new order."""
    kinds = getattr(config, "layer_types", None)
    return {} if kinds is None else {"layer_types": tuple(kinds[layer] for layer in order)}


def resize_vocab(model: Any, params: _Params, size: int) -> tuple[Any, dict[str, Any]]:
    """Change the number of tokens that a model knows.

    Use it for a base whose adapter was trained with added tokens, before loading the adapter.

    Args:
      model: a decoder of this package.
      params: its parameters.
      size: how many tokens there are to be; new ones start as the mean of the old, and a smaller
        vocabulary leaves the last ones off.

    Returns:
      The model of the new vocabulary, and its parameters.

    Raises:
      ModelError: if the size is no positive number.

    Example:
      >>> import jax_lora as jl
      >>> from jax_lora.bundled import model_path
      >>> model, params = jl.models.load(model_path())
      >>> larger, params = resize_vocab(model, params, model.config.vocab_size + 2)
      >>> params["embed_tokens"]["embedding"].shape[0] - model.config.vocab_size
      2
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise _refusal("resize_vocab", repr(size), "a whole number above 0")
    family = family_of(model)
    flat: dict[str, Any] = flatten_dict(dict(params), sep="/")
    for path, axis in ((family.embedding, 0), (family.head, -1), (family.head_bias, -1)):
        if path in flat:
            flat[path] = _resized(jnp.asarray(flat[path]), size, axis)
    config = dataclasses.replace(model.config, vocab_size=size)
    return model.clone(config=config), unflatten_dict(flat, sep="/")


def _resized(leaf: jax.Array, size: int, axis: int) -> jax.Array:
    have = leaf.shape[axis]
    if size <= have:
        return jax.lax.slice_in_dim(leaf, 0, size, axis=axis)
    mean = jnp.mean(leaf.astype(jnp.float32), axis=axis, keepdims=True).astype(leaf.dtype)
    return jnp.concatenate([leaf, jnp.repeat(mean, size - have, axis=axis)], axis=axis)


def _refusal(where: str, got: str, expected: str) -> ModelError:
    fix = "pass a model and its parameters as jax_lora.models.load returned them."
    return ModelError(format_error(where, got=got, expected=expected, fix=fix))
