"""How the output head is shared by the devices of a mesh while a loss reads it in chunks.

Without a choice, XLA gathers the head over `fsdp` for every chunk. There are two ways to move less:

* gather the head once, for many tokens;
* keep a part of the vocabulary on every device, and gather the hidden states of each chunk instead:
  forward, and twice in the backward pass. This is less for few tokens, and needs no memory for a
  whole head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jax_lora.models.families import FAMILIES
from jax_lora.models.mesh_sharding import DATA, FSDP, ROW_AXES, TENSOR, mesh_sharding, row_spec
from jax_lora.paths import flatten_with_paths

Pin = Callable[[jax.Array], jax.Array]


class SharedHead(NamedTuple):
    """The variables for `unembed`, and where its inputs and outputs are."""

    variables: Any  # `{"params": params}`
    pin_hidden: Pin = lambda x: x  # constrains hidden states, (tokens, hidden)
    pin_logits: Pin = lambda x: x  # constrains logits, (tokens, vocabulary)


def share_head(model: Any, variables: Any, tokens: int) -> SharedHead:
    """Choose how the devices share the head of a model, and constrain its parameters.

    Models of other packages, without a mesh, or on one device are left alone.

    `tokens` is the number of tokens that the head is applied to, of all devices and chunks
    together.
    """
    mesh = getattr(model, "mesh", None)
    family = next((each for each in FAMILIES.values() if isinstance(model, each.module)), None)
    if mesh is None or mesh.size == 1 or family is None:
        return SharedHead(variables)
    vocabulary = model.config.vocab_size
    over = tuple(name for name in (TENSOR, FSDP) if mesh.shape.get(name, 1) > 1)
    fits = vocabulary % math.prod(mesh.shape[name] for name in over) == 0
    is_split = FSDP in over and fits and 3 * tokens < vocabulary
    place = mesh_sharding(mesh, without=(FSDP,))
    table = f"params/{family.embedding}"
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    axes = {table: 0, "params/lm_head/kernel": 1, "params/lm_head/bias": 0}

    def constrained(x: Any, *spec: Any) -> Any:
        where = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.lax.with_sharding_constraint(x, where)

    def shared(path: str, leaf: Any) -> Any:
        if not (path.startswith("params/lm_head/") or (is_tied and path == table)):
            return leaf  # `unembed` does not read it
        spec: list[Any] = list(place(path, leaf.shape).spec)
        if is_split and path in axes:
            spec[axes[path]] = over
        return constrained(leaf, *spec)

    def rows(x: jax.Array) -> Any:
        found = row_spec(mesh, x.shape[0], (DATA,) if is_split else ROW_AXES)
        return found[0] if tuple(found) else None

    named, treedef = flatten_with_paths(variables)
    tree = jax.tree.unflatten(treedef, [shared(path, leaf) for path, leaf in named])
    pin_hidden = lambda x: constrained(x, rows(x))  # noqa: E731
    if not is_split:
        return SharedHead(tree, pin_hidden)
    return SharedHead(tree, pin_hidden, lambda x: constrained(x, rows(x), over))
