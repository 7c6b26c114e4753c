"""Adapter: a small pytree with one pair (a, b) per adapted kernel; combine and partition.

params  --combine(params, adapter)-->  params with LoraWeight leaves  --partition-->  both again
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import jax

from jax_lora import dora, paths
from jax_lora.config import LoraConfig
from jax_lora.errors import StructureError, explain
from jax_lora.lowrank import LowRank
from jax_lora.pair import LoraPair, static
from jax_lora.token_rows import TokenRows


class _NoArray:
    """A leaf that is no array by itself: whoever computes with it is told what to call."""

    path: str

    def __jax_array__(self) -> NoReturn:
        """Refuse, where JAX asks for an array in its place.

        Raises:
          StructureError: Always.
        """
        raise StructureError(
            explain(
                self.path,
                got=f"a {type(self).__name__} in a computation",
                expected="an array",
                fix="Call the function as jl.lora_apply(fn)(...), or merge the adapter first.",
            )
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight(_NoArray):
    """A leaf that stands for W0 + scale * a @ b.

    Args:
      base: W0, frozen.
      pair: The trainable factors.
      dropout_key: Key that switches dropout on, or None.
      config: The adapter's configuration.
      path: The leaf's own path.
    """

    base: Any
    pair: LoraPair
    dropout_key: Any
    config: LoraConfig = static()
    path: str = static()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeWeight(_NoArray):
    """A leaf that is trained whole: `value` stands in for `base`, which is kept.

    Args:
      base: The frozen leaf.
      value: The trainable leaf of the same shape.
      config: The adapter's configuration.
      path: The leaf's own path.
    """

    base: Any
    value: Any
    config: LoraConfig = static()
    path: str = static()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowsWeight(_NoArray):
    """A table of which some rows are trained: `rows` stand in for those of `base`.

    Args:
      base: The frozen table, `(vocab, dim)`.
      rows: The trainable rows.
      config: The adapter's configuration.
      path: The leaf's own path.
    """

    base: Any
    rows: TokenRows
    config: LoraConfig = static()
    path: str = static()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """All that training changes: pairs, whole leaves and rows by path, and the configuration.

    Args:
      pairs: `{"params/layers/attn/q_proj/kernel": LoraPair, ...}`.
      whole: Leaves trained whole (`modules_to_save`) by path.
      config: What the adapter was made from.
      rows: Rows trained in place of a table's own by path.
    """

    pairs: dict[str, LoraPair]
    whole: dict[str, Any]
    config: LoraConfig = static()
    rows: dict[str, TokenRows] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Count the trainable numbers."""
        whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((self.whole, self.rows)))
        return whole + sum(pair.size for pair in self.pairs.values())


def is_adapted(node: Any) -> bool:
    """Tell whether a node is a leaf with an adapter: `is_leaf` for tree functions."""
    return isinstance(node, (LoraWeight, WholeWeight, RowsWeight))


def not_combined(
    where: str, expected: str = "a tree from jl.combine(variables, adapter)"
) -> StructureError:
    """Build the error for a tree that has no adapter in it."""
    return StructureError(
        explain(
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
    leaves, treedef = paths.flatten_with_paths(tree, is_leaf=is_adapted)
    problems = _combine_problems(dict(leaves), adapter)
    if problems:
        raise StructureError(
            explain(
                f"combine: {len(problems)} of the adapter's leaves do not fit the tree",
                got="\n" + "\n".join(f"    {problem}" for problem in problems),
                expected="the tree that the adapter was made for, not combined before",
                fix="Pass the same tree as to lora_init, or partition it first.",
            )
        )
    return jax.tree.unflatten(treedef, [_adapted(path, leaf, adapter) for path, leaf in leaves])


def _adapted(path: str, leaf: Any, adapter: Adapter) -> Any:
    if path in adapter.pairs:
        return LoraWeight(leaf, adapter.pairs[path], None, adapter.config, path)
    if path in adapter.whole:
        return WholeWeight(leaf, adapter.whole[path], adapter.config, path)
    if path in adapter.rows:
        return RowsWeight(leaf, adapter.rows[path], adapter.config, path)
    return leaf


def _combine_problems(leaves: Mapping[str, Any], adapter: Adapter) -> list[str]:
    problems = _own_problems(adapter)
    for path, part in (*adapter.pairs.items(), *adapter.whole.items(), *adapter.rows.items()):
        if path not in leaves:
            near = ", ".join(paths.nearest(path, leaves, 3))
            problems.append(f"{path}: not in the tree; the nearest are {near}")
        elif is_adapted(leaves[path]):
            problems.append(f"{path}: has an adapter already")
        elif isinstance(part, TokenRows):
            shaped = all(hasattr(each, "shape") for each in (leaves[path], part.values))
            if shaped and (why := part.problem(leaves[path].shape)) is not None:
                problems.append(f"{path}: {why}")
        elif (want := _shape_wanted(part)) != (have := getattr(leaves[path], "shape", want)):
            problems.append(f"{path}: the tree has shape {have}, the adapter is for {want}")
    return problems


def _own_problems(adapter: Adapter) -> list[str]:
    """Say what in an adapter does not go together, whatever the tree."""
    parts = [*adapter.pairs, *adapter.whole, *adapter.rows]
    twice = dict.fromkeys(path for path in parts if parts.count(path) > 1)
    both = [path for path, pair in adapter.pairs.items() if {"magnitude", "bias"} <= {*pair.arrays}]
    return [
        *(f"{path}: is more than one of a pair, a whole leaf and rows" for path in twice),
        *(f"{path}: has a magnitude and a bias, which do not go together" for path in both),
    ]


def _shape_wanted(part: Any) -> tuple[int, ...] | None:
    try:
        return part.kernel_shape if isinstance(part, LoraPair) else part.shape
    except (AttributeError, TypeError, ValueError):
        return None  # a tree of masks, specs or other stand-ins, which have no shape


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
    leaves, treedef = paths.flatten_with_paths(lora_tree, is_leaf=is_adapted)
    adapted = [leaf for _, leaf in leaves if is_adapted(leaf)]
    if not adapted:
        raise not_combined("partition")
    base = [leaf.base if is_adapted(leaf) else leaf for _, leaf in leaves]
    pairs = {leaf.path: leaf.pair for leaf in adapted if isinstance(leaf, LoraWeight)}
    whole = {leaf.path: leaf.value for leaf in adapted if isinstance(leaf, WholeWeight)}
    rows = {leaf.path: leaf.rows for leaf in adapted if isinstance(leaf, RowsWeight)}
    return jax.tree.unflatten(treedef, base), Adapter(pairs, whole, adapted[0].config, rows)


# -----------------------------------------------------------------------------------------------
# What a leaf stands for
# -----------------------------------------------------------------------------------------------


def to_lowrank(weight: LoraWeight) -> LowRank:
    """View a leaf as the low-rank value that `lora_apply` computes with."""
    pair = weight.pair
    b, scale = pair.scaled_b()
    gain = None if pair.magnitude is None else dora.gain(weight.base, pair)
    return LowRank(
        w=jax.lax.stop_gradient(weight.base),
        a=pair.a,
        b=b,
        key=weight.dropout_key,
        w_labels=tuple(range(weight.base.ndim)),
        a_labels=pair.a_labels,
        b_labels=pair.b_labels,
        scale=scale,
        rate=weight.config.dropout if weight.dropout_key is not None else 0.0,
        path=weight.path,
        gain=gain,
        gain_labels=() if gain is None else pair.vector_labels,
        bias=None if pair.bias is None else pair.scaled_bias(),
        bias_labels=() if pair.bias is None else pair.vector_labels,
    )
