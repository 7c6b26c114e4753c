"""The shardings of a training state on a mesh."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_lora.finetune.step import TrainState


def placed_or_replicated(tree: Any, mesh: Mesh) -> Any:
    """Return the sharding of every leaf that is on the mesh already, and replicate the others."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def of(leaf: Any) -> NamedSharding:
        found = getattr(leaf, "sharding", None)
        return found if isinstance(found, NamedSharding) and found.mesh == mesh else everywhere

    return jax.tree.map(of, tree)


def state_shardings(state: TrainState, trainable: Any, mesh: Mesh) -> TrainState:
    """Choose the shardings of a state: those of the parameters also for their optimizer state.

    A leaf of the optimizer state belongs to the parameter whose path its own path ends with, and
    whose shape it has. All other leaves are replicated. `trainable` has the shardings of
    `state.trainable`; the state may be shapes.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    flat, _ = jax.tree_util.tree_flatten_with_path(state.trainable)
    pairs = zip(flat, jax.tree.leaves(trainable), strict=True)
    own = {path: (leaf.shape, sharding) for (path, leaf), sharding in pairs}

    def of(path: Any, leaf: Any) -> NamedSharding:
        tails = (own.get(path[start:]) for start in range(len(path)))
        shape, found = next((each for each in tails if each), (None, everywhere))
        return found if shape == leaf.shape else everywhere

    opt_state = jax.tree_util.tree_map_with_path(of, state.opt_state)
    step: Any = everywhere
    return TrainState(trainable, opt_state, step)
