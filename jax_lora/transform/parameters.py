"""Distinguish the parameters of a model from its state and constants."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from jax_lora import paths
from jax_lora.adapter import is_weight


def not_parameters(tree: Any) -> dict[str, str]:
    """Find the leaves that are not parameters, and return the reasons by path.

    The parameters of Linen variables are in the collection `params`; those of NNX state have the
    type `nnx.Param`. In any other tree all leaves are parameters.

    Example:
      >>> not_parameters({"params": {"kernel": 1.0}, "batch_stats": {"mean": 0.0}})
      {'batch_stats/mean': "it is in the collection 'batch_stats', which has no parameters"}
    """
    named = [path for path, _ in paths.flatten_with_paths(tree, is_leaf=is_weight)[0]]
    return {**dict(_in_other_collections(named)), **dict(_other_variables(tree))}


def _in_other_collections(named: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the leaves of collections next to a collection `params`, at any depth."""
    above = {prefix for path in named if (prefix := _above_params(path)) is not None}
    for path in named:
        for prefix in above:
            collection = path.removeprefix(prefix).split("/")[0]
            if path.startswith(prefix) and collection != "params":
                yield path, f"it is in the collection {collection!r}, which has no parameters"


def _above_params(path: str) -> str | None:
    """Return the part of a path before the collection `params`, or None without one."""
    segments = path.split("/")
    if "params" not in segments[:-1]:
        return None
    return "".join(f"{segment}/" for segment in segments[: segments.index("params")])


def _other_variables(tree: Any) -> Iterator[tuple[str, str]]:
    """Yield NNX variables that are not an `nnx.Param`."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return  # no NNX variable can exist
    nodes = paths.flatten_with_paths(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]
    for path, node in nodes:
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param):
            yield path, f"it is an nnx.{type(node).__name__}, not an nnx.Param"
