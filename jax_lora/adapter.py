"""Adapter: a small pytree of updates, one per adapted leaf; combine and partition.

params  --combine(params, adapter)-->  params with LoraWeight leaves  --partition-->  both again
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
from jax_lora.errors import StructureError, format_error
from jax_lora.kernels import flax_state
from jax_lora.updates import LoraPair, TokenRows, Update, WholeLeaf


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """A leaf of the parameters with an adapter: a frozen base and a trainable update.

    Args:
      base: The frozen leaf: an array or a `Recipe`.
      update: The trainable part: a `LoraPair`, a `WholeLeaf` or `TokenRows`.
      dropout_key: Key that switches dropout on, or None.
      config: The adapter's configuration.
      path: The leaf's own path.
    """

    base: Any
    update: Any
    dropout_key: Any
    config: LoraConfig = static()
    path: str = static()

    def __post_init__(self) -> None:
        """Let Flax's serialization know this node."""
        flax_state.register()

    @property
    def pair(self) -> Any:
        """The update of a leaf that has a `LoraPair`."""
        return self.update

    def __jax_array__(self) -> NoReturn:
        """Refuse, where JAX asks for an array instead.

        Raises:
          StructureError: Always.
        """
        raise StructureError(
            format_error(
                self.path,
                got=f"a {type(self).__name__} in a computation",
                expected="an array",
                fix="Call the function as jl.lora_apply(fn)(...), or merge the adapter first.",
            )
        )


@flax_state.node
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """All trainable parameters: pairs, whole leaves and token rows by path, and the configuration.

    Args:
      pairs: `{"params/layers/attn/q_proj/kernel": LoraPair, ...}`.
      whole: Leaves that are trained whole (`modules_to_save`) by path.
      config: What the adapter was made from.
      rows: Trained rows that replace those of a table by path.
    """

    pairs: dict[str, LoraPair]
    whole: dict[str, Any]
    config: LoraConfig = static()
    rows: dict[str, TokenRows] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Let Flax's serialization know this node."""
        flax_state.register()

    @classmethod
    def of(cls, updates: Mapping[str, Update], config: LoraConfig) -> Adapter:
        """Build an adapter from updates of any kind by path."""
        groups: dict[str, dict[str, Any]] = {"pairs": {}, "whole": {}, "rows": {}}
        for path, update in updates.items():
            groups[update.group][path] = update
        whole = {path: each.value for path, each in groups["whole"].items()}
        return cls(groups["pairs"], whole, config, groups["rows"])

    @property
    def updates(self) -> dict[str, Any]:
        """The update of every adapted leaf by path."""
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
        """Tell whether the leaf of this path is adapted."""
        return path in self.updates


flax_state.node(Recipe)  # which belongs to the algebra, that knows no Flax


def is_adapted(node: Any) -> bool:
    """Tell whether a node is a leaf with an adapter: `is_leaf` for tree functions."""
    return isinstance(node, LoraWeight)


def is_weight(node: Any) -> bool:
    """Tell whether a node is one leaf of the parameters, though it holds several arrays."""
    return isinstance(node, LoraWeight | Recipe)


def base_of(node: Any) -> Any:
    """Return the frozen leaf of a node, which is the node itself where there is no adapter."""
    return node.base if isinstance(node, LoraWeight) else node


def not_combined(
    where: str, expected: str = "a tree from jl.combine(variables, adapter)"
) -> StructureError:
    """Build the error for a tree that has no adapter in it."""
    return StructureError(
        format_error(
            where,
            got="a tree without a single LoraWeight",
            expected=expected,
            fix="Combine the tree with its adapter first.",
        )
    )


# -----------------------------------------------------------------------------------------------
# combine and partition
# -----------------------------------------------------------------------------------------------


def combine(tree: Any, adapter: Adapter) -> Any:
    """Put an adapter's factors beside the leaves that they belong to.

    Use it inside the loss function to differentiate with respect to the adapter alone, or once at
    the start to train the whole tree with `masked_optimizer`. Nothing is copied.

    Args:
      tree: Parameters of any model, as `lora_init` saw them.
      adapter: The adapter.

    Returns:
      The same tree with a `LoraWeight` at every adapted kernel, for `lora_apply`.

    Raises:
      StructureError: A path that the tree lacks, a leaf of another shape, or a leaf that has an
        adapter already; all of them in one message.

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
            format_error(
                f"combine: {len(problems)} of the adapter's leaves do not fit the tree",
                got="\n" + "\n".join(f"    {problem}" for problem in problems),
                expected="the tree that the adapter was made for, not combined before",
                fix="Pass the same tree as to lora_init, or partition it first.",
            )
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
    problems = [f"{path}: is more than one of a pair, a whole leaf and rows" for path in twice]
    for path, update in adapter.updates.items():
        if path not in leaves:
            near = ", ".join(paths.nearest(path, leaves, 3))
            problems.append(f"{path}: not in the tree; the nearest are {near}")
        elif is_adapted(leaves[path]):
            problems.append(f"{path}: has an adapter already")
        elif (why := misfit(update, leaves[path])) is not None:
            problems.append(f"{path}: {why}")
    return problems


def misfit(update: Any, leaf: Any, holder: str = "tree") -> str | None:
    """Say why an update does not fit a leaf, or return None.

    Args:
      update: The update; one of masks, shardings or other stand-ins has no shape and fits any leaf.
      leaf: The leaf.
      holder: What messages call the owner of the leaf.

    Returns:
      The reason.
    """
    try:
        return update.problem(leaf.shape, holder)
    except (AttributeError, TypeError, ValueError):
        return None


def partition(lora_tree: Any) -> tuple[Any, Adapter]:
    """Take a combined tree apart again: the exact inverse of `combine`.

    Args:
      lora_tree: A tree from `combine`, before or after training.

    Returns:
      The plain tree with its own treedef, and the adapter.

    Raises:
      StructureError: The tree has no adapted leaf.

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
