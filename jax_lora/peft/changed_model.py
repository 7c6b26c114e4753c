"""Change a base model in the way that PEFT does before it adds an adapter.

    layer_replication          -> replicate_layers
    tables of another size     -> resize_vocab
    one end of a tied table    -> untie

The configuration and the tensors of the adapter determine which changes are necessary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_lora import paths
from jax_lora.models.families import family_of
from jax_lora.models.surgery import replicate_layers, resize_vocab, untie
from jax_lora.peft import keys
from jax_lora.peft.hf_modules import find_leaves, sites_of
from jax_lora.peft.load import group
from jax_lora.peft.tied import HEAD, settle, tied_table

_Tensors = Mapping[str, np.ndarray]
_Params = Mapping[str, Any]
# Tensors with the values of an embedding table of the base model.
_FROZEN = (keys.FROZEN, keys.ROWS_FROZEN, ".original_module.weight")


def changed_model(
    model: Any, params: _Params, tensors: _Tensors, config: Mapping[str, Any]
) -> tuple[Any, _Params]:
    """Change a base model to the model that an adapter was trained on.

    `params` are without the "params" level. If no change is necessary, the model and the parameters
    are returned unchanged, as the same objects.
    """
    model, params = _replicated(model, params, config)
    before = _table(model, params).shape[0]
    model, params = _resized(model, params, tensors)
    # Before untying, because the new head copies the table with its new rows; and after untying,
    # because the file may have new rows of the head only.
    params = _with_rows(model, params, tensors, before)
    model, params = _untied(model, params, tensors, config)
    return model, _with_rows(model, params, tensors, before)


def _replicated(model: Any, params: _Params, config: Mapping[str, Any]) -> tuple[Any, _Params]:
    family, ranges = family_of(model), config["layer_replication"]
    order = [layer for start, stop in ranges or [] for layer in range(start, stop)]
    if not order or (family.depth and order == list(range(getattr(model.config, family.depth)))):
        return model, params
    return replicate_layers(model, params, ranges)


def _table(model: Any, params: _Params) -> Any:
    """Return the embedding table, (vocabulary, hidden)."""
    return flatten_dict(dict(params), sep="/")[family_of(model).embedding]


def _resized(model: Any, params: _Params, tensors: _Tensors) -> tuple[Any, _Params]:
    have, width = _table(model, params).shape
    sizes = [
        tensor.shape[0]
        for _, name in _tables(model)
        for suffix in (".weight", *_FROZEN)
        if (tensor := tensors.get(name + suffix)) is not None
        and tensor.ndim == 2
        and tensor.shape[1] == width
    ]
    if not sizes or sizes[0] == have:
        return model, params
    return resize_vocab(model, params, sizes[0])


def _with_rows(model: Any, params: _Params, tensors: _Tensors, first: int) -> _Params:
    """Replace the rows of added tokens, from `first` on, by those of the file."""
    if _table(model, params).shape[0] <= first:
        return params
    flat: dict[str, Any] = flatten_dict(dict(params), sep="/")
    for path, name in _tables(model):
        frozen = next((tensors[name + each] for each in _FROZEN if name + each in tensors), None)
        if frozen is None or path not in flat:
            continue
        is_table = path == family_of(model).embedding
        leaf = flat[path] if is_table else flat[path].T  # (vocabulary, hidden)
        if leaf.shape == frozen.shape:
            leaf = leaf.at[first:].set(jnp.asarray(frozen[first:], leaf.dtype))
            flat[path] = leaf if is_table else leaf.T
    return unflatten_dict(flat, sep="/")


def _tables(model: Any) -> Iterator[tuple[str, str]]:
    """Yield the paths of the embedding and of the head, with the stems of their PEFT names."""
    family, names = family_of(model), model.hf_names
    yield family.embedding, keys.PREFIX + names[family.embedding]
    if family.head is not None:
        yield family.head, keys.PREFIX + names.get(family.head, HEAD)


def _untied(
    model: Any, params: _Params, tensors: _Tensors, config: Mapping[str, Any]
) -> tuple[Any, _Params]:
    table = tied_table(model.hf_names)
    if table is None:
        return model, params
    sites = sites_of(find_leaves(params, model.hf_names))
    grouped, rest = group(tensors, sites)
    base = dict(paths.flatten_with_paths(params)[0])
    ends = settle(grouped, rest, table, config, base.get(sites[table].leaf.path))
    return untie(model, params) if ends.one_sided else (model, params)
