"""Merge the biases of LoRA pairs into the biases of their layers."""

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
    """Add scale * bias of every pair to the bias of its layer.

    Args:
      verb: Name of the public function, for messages.
      leaves: The merged leaves by path.
      pairs: The adapter's pairs by path.
      sign: 1 to add, -1 to subtract.

    Returns:
      The changed leaves by path.

    Raises:
      MergeError: A layer has no bias, or a bias of another shape. One message lists all of them.
    """
    changed: dict[str, Any] = {}
    problems = []
    for path, pair in pairs.items():
        if pair.bias is None:
            continue
        beside, added = _beside(path), _in_order(pair)
        if beside is None or beside not in leaves:
            problems.append(f"{path}: its layer has no leaf {beside or 'bias'}")
        elif leaves[beside].shape != added.shape:
            problems.append(
                f"{beside}: shape {leaves[beside].shape}, the bias of the pair has {added.shape}"
            )
        else:
            leaf = leaves[beside]
            wide = accumulation_dtype(leaf.dtype)
            changed[beside] = (leaf.astype(wide) + sign * added.astype(wide)).astype(leaf.dtype)
    if problems:
        raise MergeError(
            format_error(
                f"{verb}: {len(problems)} biases of pairs do not fit the base model",
                got=problems,
                expected="a leaf `bias` with the kernel's output shape in every such layer",
                fix="Add a zero bias to those layers (use_bias=True), or use lora_apply unmerged.",
            )
        )
    return changed


def _beside(path: str) -> str | None:
    head, _, name = path.rpartition("/")
    if name != "kernel":
        return None  # the bias of a leaf with another name is not defined
    return f"{head}/bias" if head else "bias"


def _in_order(pair: LoraPair) -> jax.Array:
    """Transpose scale * bias to the order of the kernel's axes, which the layer's bias has."""
    axes = list(pair.vector_axes)
    order = sorted(range(len(axes)), key=lambda place: axes[place])  # type: ignore[arg-type]
    return pair.scaled_bias().transpose(order)
