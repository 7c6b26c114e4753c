"""Paths of leaves, and how patterns match them.

The leaf of `{"params": {"layers": {"q_proj": {"kernel": w}}}}` has the path
`params/layers/q_proj/kernel` in patterns, tables, messages and checkpoints.
"""

from __future__ import annotations

import difflib
import fnmatch
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

_GLOB_CHARACTERS = frozenset("*?[")


def format_path(key_path: Sequence[Any]) -> str:
    """Convert a JAX key path to a path.

    Args:
      key_path: Keys from `jax.tree_util.tree_flatten_with_path`.

    Returns:
      The keys joined with "/". The final `.value` of an NNX variable is omitted, so that Linen and
      NNX models with equal layers have equal paths.

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
    # Of DictKey and FlattenedIndexKey, of SequenceKey, of GetAttrKey.
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def flatten_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
    """Flatten a tree into (path, leaf) pairs and a treedef.

    Args:
      tree: Any pytree.
      is_leaf: As in `jax.tree.flatten`.

    Returns:
      The pairs in the leaf order of JAX, and the treedef.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(format_path(key_path), leaf) for key_path, leaf in leaves], treedef


def is_glob(pattern: str) -> bool:
    """Tell whether a pattern has wildcards (`*`, `?`, `[`)."""
    return any(character in _GLOB_CHARACTERS for character in pattern)


def matches(pattern: str, path: str) -> bool:
    """Tell whether a pattern matches a path.

    A name matches one or more consecutive whole segments: `q_proj` and `attn/q_proj` match
    `layers/attn/q_proj/kernel`, and `q_proj` does not match `q_proj_norm`. A glob matches
    consecutive segments or the whole path.

    Args:
      pattern: A name such as `q_proj`, or a glob such as `layers/*/kernel`.
      path: A path from `format_path`.

    Returns:
      Whether the pattern matches.

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


def braces(template: str) -> tuple[str, ...]:
    """Return the names in the braces of a template, in order.

    Example:
      >>> braces("model.layers.{layer}.mlp.experts.{expert}.w1")
      ('layer', 'expert')
    """
    return tuple(field for _, field, _, _ in string.Formatter().parse(template) if field)


def layer_path(path: str, index: int) -> str:
    """Return the path of one layer of a layer stack, as if the layers were in a list.

    Args:
      path: Path of the stacked leaf.
      index: Index along the first stack axis.

    Returns:
      The path with the index after its first segment (the one after `params`, if it starts so).

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
    """Find the paths most similar to a misspelled name.

    Args:
      name: A path, a glob or a part of a path.
      candidates: Existing paths.
      count: Maximum number of results.

    Returns:
      The most similar paths, best first.

    Example:
      >>> nearest("q_porj", ["layers/q_proj/kernel", "layers/mlp/kernel"], count=1)
      ['layers/q_proj/kernel']
    """

    def likeness(path: str) -> float:
        whole = difflib.SequenceMatcher(None, name, path).ratio()
        parts = (difflib.SequenceMatcher(None, name, part).ratio() for part in path.split("/"))
        return max(whole, *parts)

    return sorted(candidates, key=lambda path: (-likeness(path), path))[:count]
