"""Merge the biases of LoRA pairs (PEFT's `lora_bias`) into the biases of their layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jax_lora.algebra.low_rank import accumulation_dtype
from jax_lora.errors import MergeError
from jax_lora.updates import LoraPair


def merge_biases(
    function_name: str, leaves: Mapping[str, Any], pairs: Mapping[str, LoraPair], sign: int
) -> dict[str, Any]:
    """Return the merged bias leaves by path: each layer's bias plus scale * bias of its pair.

    Use it after the kernels are merged. The bias of a pair is not part of the weight, so it needs a
    bias leaf in the layer. `function_name` is that of the public function, for messages.

    Raises:
      MergeError: A layer has no bias, or a bias of another shape. One message lists all of them.
    """
    merged: dict[str, Any] = {}
    problems = []
    for path, pair in pairs.items():
        if pair.bias is None:
            continue
        layer, _, name = path.rpartition("/")
        bias_path, update = f"{layer}/bias" if layer else "bias", _bias_in_kernel_order(pair)
        if name != "kernel":  # only Flax kernels have a sibling leaf named bias
            problems.append(f"{path}: biases can be merged only for leaves named 'kernel'")
        elif bias_path not in leaves:
            problems.append(f"{path}: the base model has no leaf {bias_path}")
        elif (shape := leaves[bias_path].shape) != update.shape:
            problems.append(f"{bias_path}: shape {shape}; the adapter's bias has {update.shape}")
        else:
            leaf = leaves[bias_path]
            accum_dtype = accumulation_dtype(leaf.dtype)
            total = leaf.astype(accum_dtype) + sign * update.astype(accum_dtype)
            merged[bias_path] = total.astype(leaf.dtype)
    if problems:
        raise MergeError(
            f"{function_name}: {len(problems)} adapter biases do not match the base model",
            got=problems,
            expected="a leaf `bias` with the kernel's output shape in every such layer",
            fix="Add a zero bias to those layers (use_bias=True), or run the adapter with "
            "lora_apply instead of merging.",
        )
    return merged


def _bias_in_kernel_order(pair: LoraPair) -> jax.Array:
    """Transpose scale * bias to the order of the kernel's axes, the order of the layer's bias."""
    order = np.argsort((*pair.stack_axes, *pair.out_axes))
    return pair.scaled_bias().transpose(tuple(int(i) for i in order))
