"""Parameters: which leaves of a tree are trained, and which are state or constants of the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from jax_lora import paths
from jax_lora.adapter import is_weight


def not_parameters(tree: Any) -> dict[str, str]:
    """Find the leaves that are no parameters, and say why.

    Args:
      tree: Linen variables, of which the collection `params` holds the parameters; NNX state, where
        variables of type `nnx.Param` do; or any other tree, where all leaves are parameters.

    Returns:
      The reason by path.

    Example:
      >>> not_parameters({"params": {"kernel": 1.0}, "batch_stats": {"mean": 0.0}})
      {'batch_stats/mean': "it is in the collection 'batch_stats', which holds no parameters"}
    """
    named = [path for path, _ in paths.flatten_with_paths(tree, is_leaf=is_weight)[0]]
    return {**dict(_in_other_collections(named)), **dict(_other_variables(tree))}


def _in_other_collections(named: list[str]) -> Iterator[tuple[str, str]]:
    """Yield what lies beside a collection `params`, at any depth of the tree."""
    above = {prefix for path in named if (prefix := _above_params(path)) is not None}
    for path in named:
        for prefix in above:
            collection = path.removeprefix(prefix).split("/")[0]
            if path.startswith(prefix) and collection != "params":
                yield path, f"it is in the collection {collection!r}, which holds no parameters"


def _above_params(path: str) -> str | None:
    """Return the part of a path before the collection `params`, or None without one."""
    segments = path.split("/")
    if "params" not in segments[:-1]:
        return None
    return "".join(f"{segment}/" for segment in segments[: segments.index("params")])


def _other_variables(tree: Any) -> Iterator[tuple[str, str]]:
    """Yield NNX variables that are no `nnx.Param`."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return  # there can be none
    nodes = paths.flatten_with_paths(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]
    for path, node in nodes:
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param):
            yield path, f"it is an nnx.{type(node).__name__}, not an nnx.Param"
