"""Convert trees of Linen variables to flat dicts by path."""

from __future__ import annotations

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict


def flatten(tree: Any) -> dict[str, Any]:
    """Flatten nested dicts: `{"params/block_0/q_proj/kernel": leaf, ...}`."""
    return dict(flatten_dict(tree, sep="/"))


def unflatten(leaves: dict[str, Any]) -> Any:
    """Invert `flatten`."""
    return unflatten_dict(leaves, sep="/")
