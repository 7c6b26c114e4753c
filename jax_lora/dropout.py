"""dropout: switch the adapter's dropout on for one training step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jax_lora.adapter import is_adapted, not_combined
from jax_lora.init import path_key


def dropout(lora_tree: Any, key: jax.Array) -> Any:
    """Switch the adapter's dropout on: for training only.

    The rate is the configuration's. A share of the inputs of every pair is set to zero, and the
    rest scaled up; W0 sees its input whole. The keys ride along as data, so a step compiles once;
    every layer, use, scan step and token drops inputs of its own, and remat drops the same again.
    In a function that calls `jax.shard_map`, shards whose data differ drop inputs of their own,
    and shards that hold the same data drop the same. Where `lora_apply` is itself called inside
    `shard_map`, fold `jax.lax.axis_index` of the batch's axis into the key.
    A weight that has to be materialised is formed without dropout.

    Args:
      lora_tree: A tree from `combine`.
      key: Random key of this step.

    Returns:
      The same tree, whose `LoraWeight`s carry a key each. With a rate of 0, the tree as it was.

    Raises:
      StructureError: The tree has no `LoraWeight`.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), appendix D: dropout on the adapter's branch.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> config = jl.LoraConfig(rank=2, dropout=0.1)
      >>> lora_params = jl.combine(params, jl.lora_init(jax.random.key(0), params, config))
      >>> jl.dropout(lora_params, jax.random.key(1))["kernel"].dropout_key.shape
      ()
    """
    nodes, treedef = jax.tree.flatten(lora_tree, is_leaf=is_adapted)
    if not any(map(is_adapted, nodes)):
        raise not_combined("dropout")
    return jax.tree.unflatten(treedef, [_switched_on(node, key) for node in nodes])


def _switched_on(node: Any, key: jax.Array) -> Any:
    if not is_adapted(node) or node.update.group != "pairs" or node.config.dropout == 0.0:
        return node
    return dataclasses.replace(node, dropout_key=path_key(key, node.path))
