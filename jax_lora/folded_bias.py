"""Where the biases of merged pairs go: into the biases of their layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jax_lora.algebra.low_rank import accumulation_dtype
from jax_lora.errors import MergeError, format_error
from jax_lora.updates import LoraPair


def fold_biases(
    verb: str, leaves: Mapping[str, Any], pairs: Mapping[str, LoraPair], sign: int
) -> dict[str, Any]:
    """Add scale * bias of every pair to the bias that stands beside its kernel.

    Args:
      verb: What is being done, for messages.
      leaves: The merged leaves by path.
      pairs: The adapter's pairs by path.
      sign: 1 to add, -1 to take off again.

    Returns:
      The leaves that change, by path.

    Raises:
      MergeError: A kernel has no bias beside it, or one of another shape; all in one message.
    """
    changed: dict[str, Any] = {}
    problems = []
    for path, pair in pairs.items():
        if pair.bias is None:
            continue
        beside, added = _beside(path), _in_order(pair)
        if beside is None or beside not in leaves:
            problems.append(f"{path}: no leaf {beside or 'bias'} beside it")
        elif leaves[beside].shape != added.shape:
            problems.append(f"{beside}: shape {leaves[beside].shape}, the bias has {added.shape}")
        else:
            leaf = leaves[beside]
            wide = accumulation_dtype(leaf.dtype)
            changed[beside] = (leaf.astype(wide) + sign * added.astype(wide)).astype(leaf.dtype)
    if problems:
        raise MergeError(
            format_error(
                f"{verb}: {len(problems)} biases of pairs have no place in the base",
                got="\n" + "\n".join(f"    {problem}" for problem in problems),
                expected="a leaf `bias` of the kernel's outputs beside every such kernel",
                fix="Give those layers a bias of zeros (use_bias=True), or keep base and adapter "
                "apart.",
            )
        )
    return changed


def _beside(path: str) -> str | None:
    head, _, name = path.rpartition("/")
    if name != "kernel":
        return None  # whose bias a leaf of another name would be is not known
    return f"{head}/bias" if head else "bias"


def _in_order(pair: LoraPair) -> jax.Array:
    """Lay scale * bias out in the order of the kernel's own axes, as the layer's bias is."""
    axes = list(pair.vector_axes)
    order = sorted(range(len(axes)), key=lambda place: axes[place])  # type: ignore[arg-type]
    return pair.scaled_bias().transpose(order)
