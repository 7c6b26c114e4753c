"""dropout: enable the adapter's dropout for one training step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jax_lora.adapter import is_adapted, not_combined
from jax_lora.init import path_key


def dropout(lora_tree: Any, key: jax.Array) -> Any:
    """Enable the adapter's dropout. Use it in training only.

    Dropout applies to the input of the LoRA branch, with the rate of the configuration; the base
    weight sees the full input. The keys are data, so a new key does not cause a recompilation.
    Every layer, use, scan step and token has an independent mask, and `jax.checkpoint` reproduces
    it. In a function that calls `jax.shard_map`, shards with different data have different masks,
    and shards with equal data have equal masks. If `lora_apply` is called inside `shard_map`, fold
    `jax.lax.axis_index` of the batch axis into the key. Dropout does not affect a materialized
    weight.

    Args:
      lora_tree: A tree from `combine`.
      key: Random key of this step.

    Returns:
      The tree with a key in every `LoraWeight`; the unchanged tree if the rate is 0.

    Raises:
      StructureError: The tree has no `LoraWeight`.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), appendix D: dropout on the LoRA branch.

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
    return jax.tree.unflatten(treedef, [_with_key(node, key) for node in nodes])


def _with_key(node: Any, key: jax.Array) -> Any:
    if not is_adapted(node) or node.update.group != "pairs" or node.config.dropout == 0.0:
        return node
    return dataclasses.replace(node, dropout_key=path_key(key, node.path))
