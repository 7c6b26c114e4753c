"""Change a model's structure: untie the output head, repeat layers, resize the vocabulary.

Some adapters need a changed base model: an adapter on only the embedding or only the head of a tied
model, on repeated layers, or with added tokens. Change the model first, then load the adapter.
`jl.peft.load_model` makes the changes that a PEFT adapter requires.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_lora.errors import ModelError
from jax_lora.models.families import family_of
from jax_lora.models.model_config import is_positive_int

_Params = Mapping[str, Any]


def untie(model: Any, params: _Params) -> tuple[Any, dict[str, Any]]:
    """Give a model with a tied output head a separate head, a copy of the embedding.

    Use it before you create, load or merge an adapter that changes only one of the two. In a tied
    model, such an adapter would change both.

    Args:
      model: A decoder of this package.
      params: Its parameters.

    Returns:
      The model with `tie_word_embeddings` off, and parameters with a head. The outputs do not
      change.

    Raises:
      ModelError: If the model is not tied, or cannot have a separate head.

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
        _refuse("untie", f"a {type(model).__name__} without a tied output head", "a tied decoder")
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    flat: dict[str, Any] = flatten_dict(dict(params), sep="/")
    flat[family.head] = jnp.asarray(flat[family.embedding]).T  # (hidden, vocabulary)
    return model.clone(config=config), unflatten_dict(flat, sep="/")


def replicate_layers(
    model: Any, params: _Params, ranges: Sequence[Sequence[int]]
) -> tuple[Any, dict[str, Any]]:
    """Build a deeper model by repeating layers.

    Args:
      model: A decoder of this package.
      params: Its parameters.
      ranges: The layers `[start, stop)` to concatenate, as in PEFT's `layer_replication`.

    Returns:
      The deeper model and its parameters. Repeated layers are copies: each can have its own
      adapter, and be merged with it.

    Raises:
      ModelError: If a range is not within the model's layers, or the model has two layer stacks.

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
        _refuse("replicate_layers", got, "a model with one stack of layers")
    depth = getattr(model.config, name)
    for each in ranges:
        if len(each) != 2 or not 0 <= each[0] < each[1] <= depth:
            got, expected = f"the range {list(each)}", f"[start, stop) within the {depth} layers"
            _refuse("replicate_layers", got, expected)
    order = [layer for start, stop in ranges for layer in range(start, stop)]
    if not order:
        _refuse("replicate_layers", "no range", "at least one [start, stop)")
    changes = {name: len(order), **_per_layer(model.config, order)}
    config = dataclasses.replace(model.config, **changes)
    layers = jax.tree.map(lambda leaf: leaf[jnp.array(order, jnp.int32)], params["layers"])
    return model.clone(config=config), {**params, "layers": layers}


def _per_layer(config: Any, order: Sequence[int]) -> dict[str, Any]:
    """Reorder the settings that have one value per layer."""
    given = {name: getattr(config, name, None) for name in ("layer_types", "no_rope_layers")}
    return {
        name: tuple(values[layer] for layer in order)
        for name, values in given.items()
        if values is not None
    }


def resize_vocab(model: Any, params: _Params, size: int) -> tuple[Any, dict[str, Any]]:
    """Change the size of a model's vocabulary.

    Use it for a base model whose adapter was trained with added tokens, before loading the adapter.

    Args:
      model: A decoder of this package.
      params: Its parameters.
      size: The new number of tokens. New tokens start as the mean of the old ones; a smaller
        vocabulary drops the last ones.

    Returns:
      The model with the new vocabulary, and its parameters.

    Raises:
      ModelError: If the size is not a positive integer.

    Example:
      >>> import jax_lora as jl
      >>> from jax_lora.bundled import model_path
      >>> model, params = jl.models.load(model_path())
      >>> larger, params = resize_vocab(model, params, model.config.vocab_size + 2)
      >>> params["embed_tokens"]["embedding"].shape[0] - model.config.vocab_size
      2
    """
    if not is_positive_int(size):
        _refuse("resize_vocab", repr(size), "a positive integer")
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


def _refuse(where: str, got: str, expected: str) -> NoReturn:
    fix = "pass a model and its parameters as jax_lora.models.load returned them."
    raise ModelError(where, got=got, expected=expected, fix=fix)
