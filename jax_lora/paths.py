"""Paths: the one definition of a leaf's name, and of what a pattern matches.

A leaf of `{"params": {"layers": {"q_proj": {"kernel": w}}}}` is called
`params/layers/q_proj/kernel` everywhere: in patterns, tables, errors and checkpoints.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

_GLOB_CHARACTERS = frozenset("*?[")


def format_path(key_path: Sequence[Any]) -> str:
    """Name a leaf from the key path that JAX gives for it.

    Args:
      key_path: Keys as `jax.tree_util.tree_flatten_with_path` yields them.

    Returns:
      The keys joined with "/". The last step into an NNX variable (`.value`) is left out, so
      that a Linen and an NNX model of the same layers have the same names.

    Example:
      >>> leaves, _ = jax.tree_util.tree_flatten_with_path({"mlp": [{"kernel": 1.0}]})
      >>> format_path(leaves[0][0])
      'mlp/0/kernel'
    """
    keys = list(key_path)
    if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey):
        if keys[-1].name in ("value", "raw_value"):
            keys.pop()
    return "/".join(_key_text(key) for key in keys)


def _key_text(key: Any) -> str:
    for attribute in (
        "key",
        "idx",
        "name",
    ):  # DictKey and FlattenedIndexKey, SequenceKey, GetAttrKey
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def flatten_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
    """Flatten a tree into (path, leaf) pairs, and the treedef that builds it again.

    Args:
      tree: Any pytree.
      is_leaf: Nodes to be treated as leaves, as in `jax.tree.flatten`.

    Returns:
      The pairs in JAX's leaf order, and the treedef.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(format_path(key_path), leaf) for key_path, leaf in leaves], treedef


def is_glob(pattern: str) -> bool:
    """Tell whether a pattern has wildcards (`*`, `?`, `[`)."""
    return any(character in _GLOB_CHARACTERS for character in pattern)


def matches(pattern: str, path: str) -> bool:
    """Tell whether a pattern names a path.

    A name matches whole segments, one or several that follow each other: `q_proj` and
    `attn/q_proj` match `layers/attn/q_proj/kernel`, and `q_proj` never matches `q_proj_norm`.
    A glob matches a run of segments in the same way, or the whole path.

    Args:
      pattern: A name such as `q_proj`, or a glob such as `layers/*/kernel`.
      path: A path from `format_path`.

    Returns:
      Whether the pattern names the path.

    Example:
      >>> matches("q_proj", "layers/attn/q_proj/kernel")
      True
      >>> matches("q_proj", "layers/q_proj_norm/scale")
      False
      >>> matches("attn/*_proj", "layers/attn/q_proj/kernel")
      True
    """
    wanted = pattern.strip("/").split("/")
    segments = path.split("/")
    if is_glob(pattern) and fnmatch.fnmatchcase(path, pattern):
        return True
    return any(
        all(map(fnmatch.fnmatchcase, segments[start : start + len(wanted)], wanted))
        if is_glob(pattern)
        else segments[start : start + len(wanted)] == wanted
        for start in range(len(segments) - len(wanted) + 1)
    )


def layer_path(path: str, index: int) -> str:
    """Name one layer of a stack: its index stands where a list of layers would have it.

    Args:
      path: Path of the leaf that holds the stack.
      index: Position along the first stack axis.

    Returns:
      The path with the index after its first segment, or after the one that follows `params`.

    Example:
      >>> layer_path("params/layers/attn/q_proj/kernel", 3)
      'params/layers/3/attn/q_proj/kernel'
      >>> layer_path("layers/attn/q_proj/kernel", 3)
      'layers/3/attn/q_proj/kernel'
    """
    segments = path.split("/")
    place = 2 if segments[0] == "params" and len(segments) > 1 else 1
    return "/".join([*segments[:place], str(index), *segments[place:]])


def nearest(name: str, candidates: Iterable[str], count: int = 5) -> list[str]:
    """Find the candidates that a mistyped name most likely meant.

    Args:
      name: What was typed: a path, a glob or a part of a path.
      candidates: Real paths.
      count: How many to return at the most.

    Returns:
      The nearest candidates, best first.

    Example:
      >>> nearest("q_porj", ["layers/q_proj/kernel", "layers/mlp/kernel"], count=1)
      ['layers/q_proj/kernel']
    """

    def likeness(path: str) -> float:
        whole = difflib.SequenceMatcher(None, name, path).ratio()
        parts = (difflib.SequenceMatcher(None, name, part).ratio() for part in path.split("/"))
        return max(whole, *parts)

    return sorted(candidates, key=lambda path: (-likeness(path), path))[:count]
