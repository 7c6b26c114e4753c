"""Adapter: a pytree that holds one update per adapted leaf. `combine` and `partition`.

params  --combine(params, adapter)-->  params with LoraWeight leaves  --partition-->  both
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax

from jax_lora import paths
from jax_lora.algebra.base_weight import Recipe
from jax_lora.algebra.low_rank import static
from jax_lora.config import LoraConfig
from jax_lora.errors import StructureError
from jax_lora.storage import flax_state
from jax_lora.updates import LoraPair, TokenRows, Update, WholeLeaf


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """A leaf of a combined tree: a frozen base weight and its trainable update.

    Args:
      base: The base weight: an array or a `Recipe`.
      update: The update: a `LoraPair`, a `WholeLeaf` or `TokenRows`.
      dropout_key: Random key for dropout; None disables dropout.
      config: The adapter's configuration.
      path: Path of the leaf.
    """

    base: Any
    update: Any
    dropout_key: Any
    config: LoraConfig = static()
    path: str = static()

    def __post_init__(self) -> None:
        """Register this class with Flax's serialization."""
        flax_state.register()

    @property
    def pair(self) -> Any:
        """The update, under the name that suits a `LoraPair`."""
        return self.update

    def __jax_array__(self) -> NoReturn:
        """Raise an error where JAX expects an array.

        Raises:
          StructureError: Always.
        """
        raise StructureError(
            self.path,
            got=f"a {type(self).__name__} in a computation",
            expected="an array",
            fix="Call the function as jl.lora_apply(fn)(...), or merge the adapter first.",
        )


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """All adapter weights by path, and the configuration they were created from.

    Args:
      pairs: LoRA factors: `{"params/layers/attn/q_proj/kernel": LoraPair, ...}`.
      whole: Fully trained leaves (`modules_to_save`).
      config: The configuration.
      rows: Trained rows of embedding tables.
    """

    pairs: dict[str, LoraPair]
    whole: dict[str, Any]
    config: LoraConfig = static()
    rows: dict[str, TokenRows] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Register this class with Flax's serialization."""
        flax_state.register()

    @classmethod
    def of(cls, updates: Mapping[str, Update], config: LoraConfig) -> Adapter:
        """Build an adapter from a mapping of paths to updates of any kind."""
        groups: dict[str, dict[str, Any]] = {"pairs": {}, "whole": {}, "rows": {}}
        for path, update in updates.items():
            groups[update.group][path] = update
        whole = {path: each.value for path, each in groups["whole"].items()}
        return cls(groups["pairs"], whole, config, groups["rows"])

    @property
    def updates(self) -> dict[str, Any]:
        """Every update by the path of its leaf."""
        whole = {path: WholeLeaf(value) for path, value in self.whole.items()}
        return {**self.pairs, **whole, **self.rows}

    @property
    def size(self) -> int:
        """Number of trainable elements."""
        return sum(update.size for update in self.updates.values())

    def __iter__(self) -> Iterator[str]:
        """Iterate over the paths of the adapted leaves."""
        return iter(self.updates)

    def __contains__(self, path: object) -> bool:
        """Tell whether the leaf at this path is adapted."""
        return path in self.updates


flax_state.node(Recipe)  # registered here because the algebra does not depend on Flax


def is_adapted(node: Any) -> bool:
    """Tell whether a node is a `LoraWeight`. Use it as `is_leaf` in tree functions."""
    return isinstance(node, LoraWeight)


def is_weight(node: Any) -> bool:
    """Tell whether a node stands for one parameter although it holds several arrays."""
    return isinstance(node, LoraWeight | Recipe)


def base_of(node: Any) -> Any:
    """Return the base weight of a node; a node without an adapter is returned unchanged."""
    return node.base if isinstance(node, LoraWeight) else node


def plain_leaves(where: str, tree: Any) -> list[tuple[str, Any]]:
    """Return the (path, leaf) pairs of a tree without adapters.

    Args:
      where: Name of the public function, for the message.
      tree: The tree.

    Raises:
      StructureError: A leaf already has an adapter.
    """
    leaves, _ = paths.flatten_with_paths(tree, is_leaf=is_weight)
    for path, leaf in leaves:
        if is_adapted(leaf):
            raise StructureError(
                f"{where}: {path}",
                got="a leaf that already has an adapter",
                expected="parameters without an adapter",
                fix="Split off the adapter first: variables, adapter = jl.partition(tree).",
            )
    return leaves


def not_combined(
    where: str, expected: str = "a tree from jl.combine(variables, adapter)"
) -> StructureError:
    """Build the error for a tree without a `LoraWeight`."""
    return StructureError(
        where,
        got="a tree without any LoraWeight",
        expected=expected,
        fix="Call jl.combine(variables, adapter) first.",
    )


# -----------------------------------------------------------------------------------------------
# combine and partition
# -----------------------------------------------------------------------------------------------


def combine(tree: Any, adapter: Adapter) -> Any:
    """Attach an adapter to the parameters of its base model.

    Use it inside the loss function to differentiate with respect to the adapter only, or once
    before training to optimize the whole tree with `masked_optimizer`. No array is copied.

    Args:
      tree: The parameters that were passed to `lora_init`.
      adapter: The adapter.

    Returns:
      The tree with a `LoraWeight` at every adapted leaf, for `lora_apply`.

    Raises:
      StructureError: A path is missing from the tree, a shape differs, or a leaf already has an
        adapter. One message lists all of them.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> params = {"dense": {"kernel": jnp.ones((3, 4))}}
      >>> adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
      >>> lora_params = jl.combine(params, adapter)
      >>> type(lora_params["dense"]["kernel"]).__name__
      'LoraWeight'
      >>> jl.partition(lora_params)[0]["dense"]["kernel"] is params["dense"]["kernel"]
      True
    """
    leaves, treedef = paths.flatten_with_paths(tree, is_leaf=is_weight)
    problems = _combine_problems(dict(leaves), adapter)
    if problems:
        raise StructureError(
            f"combine: {len(problems)} leaves of the adapter do not fit the tree",
            got=problems,
            expected="the parameters that the adapter was created for, not yet combined",
            fix="Pass the tree that was passed to lora_init; jl.partition undoes jl.combine.",
        )
    updates = adapter.updates
    return jax.tree.unflatten(
        treedef,
        [
            LoraWeight(leaf, updates[path], None, adapter.config, path) if path in updates else leaf
            for path, leaf in leaves
        ],
    )


def _combine_problems(leaves: Mapping[str, Any], adapter: Adapter) -> list[str]:
    paths_of_parts = [*adapter.pairs, *adapter.whole, *adapter.rows]
    twice = dict.fromkeys(path for path in paths_of_parts if paths_of_parts.count(path) > 1)
    problems = [f"{path}: is in more than one of pairs, whole and rows" for path in twice]
    for path, update in adapter.updates.items():
        if path not in leaves:
            near = ", ".join(paths.nearest(path, leaves, 3))
            problems.append(f"{path}: not in the tree; the closest paths are {near}")
        elif is_adapted(leaves[path]):
            problems.append(f"{path}: already has an adapter")
        elif (why := misfit(update, leaves[path])) is not None:
            problems.append(f"{path}: {why}")
    return problems


def misfit(update: Any, leaf: Any, holder: str = "tree") -> str | None:
    """Return the reason why an update does not fit a leaf, or None if it fits.

    Args:
      update: The update. Masks, shardings and other values without a shape fit any leaf.
      leaf: The leaf.
      holder: Name of the tree in the reason.
    """
    try:
        return update.problem(leaf.shape, holder)
    except (AttributeError, TypeError, ValueError):
        return None


def partition(lora_tree: Any) -> tuple[Any, Adapter]:
    """Split a combined tree into parameters and adapter: the exact inverse of `combine`.

    Args:
      lora_tree: A tree from `combine`, before or after training.

    Returns:
      The parameters with their original treedef, and the adapter.

    Raises:
      StructureError: The tree has no `LoraWeight`.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
      >>> base, same = jl.partition(jl.combine(params, adapter))
      >>> jax.tree.structure(same) == jax.tree.structure(adapter)
      True
    """
    leaves, treedef = paths.flatten_with_paths(lora_tree, is_leaf=is_weight)
    adapted = [leaf for _, leaf in leaves if is_adapted(leaf)]
    if not adapted:
        raise not_combined("partition")
    base = jax.tree.unflatten(treedef, [base_of(leaf) for _, leaf in leaves])
    updates = {leaf.path: leaf.update for leaf in adapted}
    return base, Adapter.of(updates, adapted[0].config)
