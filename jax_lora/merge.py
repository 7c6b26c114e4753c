"""merge and unmerge: add an adapter's update to the base weights, or subtract it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jax_lora import paths
from jax_lora.adapter import Adapter, combine, is_adapted, is_weight
from jax_lora.algebra.base_weight import as_array
from jax_lora.errors import MergeError, MergeWarning, format_error
from jax_lora.merge_biases import merge_biases
from jax_lora.transform.low_memory_jit import low_memory_jit
from jax_lora.updates.pair import LoraPair

# A typical update, of 1% of W0, loses a quarter of its elements in bfloat16: the smallest ones.
_LOST_SHARE_TO_WARN = 0.5


def merge(variables: Any, adapter: Adapter, *, donate: bool = False) -> Any:
    """Merge an adapter into its base model: W0 + scale * a @ b, with DoRA magnitudes applied.

    Use it to run or export a trained model without `lora_apply`, at the speed of the base model.
    `variables` are not changed, unless `donate` is set. Each weight is computed in float32 (float64
    if W0 is float64), rounded once to the type of W0, and keeps the sharding of W0. Works under
    `jax.jit`, without the checks of values.

    Args:
      variables: The parameters that the adapter was created for.
      adapter: The adapter.
      donate: Free each base weight when its merged weight is computed, so that the memory of one
        model suffices. `variables` cannot be used afterwards, also if an error is raised.

    Returns:
      The merged parameters, with the same treedef, shapes and types.

    Raises:
      MergeError: A factor is NaN or Inf, a merged weight exceeds the range of its type, or a pair
        has a bias and its layer does not. The message lists every such leaf.
      StructureError: The adapter does not fit the tree.

    Warns:
      MergeWarning: Rounding to the type of W0 reverts half or more of the changed elements of a
        leaf.

    Reference:
      Hu et al., LoRA (arXiv:2106.09685), section 4.1: "no additional inference latency".

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> params = {"kernel": jnp.zeros((3, 4))}
      >>> pair = jl.LoraPair(a=jnp.ones((3, 2)), b=jnp.ones((2, 4)), scale=0.5)
      >>> adapter = jl.Adapter({"kernel": pair}, {}, jl.LoraConfig(rank=2, alpha=1.0))
      >>> float(merge(params, adapter)["kernel"][0, 0])
      1.0
    """
    return _with_update(variables, adapter, sign=1, donate=donate)


def unmerge(merged: Any, adapter: Adapter) -> Any:
    """Subtract a merged adapter from the weights: W - scale * a @ b.

    Use it if no copy of the base model is left. The result is exact up to rounding: the error of
    an element is at most eps * (|W0| + |delta|), where eps is 1.2e-7 for float32 and 7.8e-3 for
    bfloat16. To restore the base model bit for bit, keep `variables`, which `merge` does not
    change.

    Args:
      merged: Parameters from `merge`.
      adapter: The adapter that was merged.

    Returns:
      The base parameters, up to rounding.

    Raises:
      MergeError: A factor is NaN or Inf, or the adapter has fully trained leaves, token rows or
        DoRA magnitudes, whose base values cannot be recovered from the merged weights.
      StructureError: The adapter does not fit the tree.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> params = {"kernel": jnp.full((3, 4), 0.1)}
      >>> pair = jl.LoraPair(a=jnp.ones((3, 2)), b=jnp.ones((2, 4)), scale=0.5)
      >>> adapter = jl.Adapter({"kernel": pair}, {}, jl.LoraConfig(rank=2, alpha=1.0))
      >>> again = unmerge(merge(params, adapter), adapter)
      >>> bool(jnp.abs(again["kernel"] - params["kernel"]).max() < 2e-7)
      True
    """
    lost = {path: why for path, each in adapter.updates.items() if (why := each.irreversible)}
    if lost:
        raise MergeError(
            f"unmerge: {', '.join(lost)}",
            got="; ".join(dict.fromkeys(lost.values())),
            expected="an adapter of LoRA pairs without magnitudes",
            fix="Keep the base variables and use them instead: merge does not change them.",
        )
    return _with_update(merged, adapter, sign=-1)


# -----------------------------------------------------------------------------------------------
# One leaf
# -----------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Report:
    """Statistics of one merged leaf, as scalars that are read only outside jit."""

    bad: dict[str, Any]
    overflown: Any
    changed: Any
    lost: Any


@functools.partial(jax.jit, static_argnames="sign")
def _merged_leaf(base: jax.Array, update: Any, sign: int) -> tuple[jax.Array, _Report]:
    total, changed = update.merged(base, sign)  # (*leaf)
    merged = total.astype(base.dtype)  # (*leaf)
    overflown = ~jnp.isfinite(merged) & jnp.isfinite(base)
    report = _Report(
        bad={name: jnp.sum(~jnp.isfinite(array)) for name, array in update.arrays.items()},
        overflown=jnp.mean(overflown.astype(jnp.float32)),
        changed=jnp.mean(changed.astype(jnp.float32)),
        lost=jnp.mean((changed & (merged == base)).astype(jnp.float32)),
    )
    return merged, report


@functools.partial(low_memory_jit, static_argnames="sign")
def _merged_stack(base: jax.Array, pair: LoraPair, sign: int) -> tuple[jax.Array, _Report]:
    """Merge layer by layer, so that only one layer is in memory in float32."""

    def merged_layer(layer: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, _Report]:
        base, a, b = layer
        return _merged_leaf(base, pair.of_layer(a, b), sign)

    merged, each = jax.lax.map(merged_layer, (base, pair.a, pair.b))
    shares = jax.tree.map(jnp.mean, each)
    return merged, dataclasses.replace(shares, bad=jax.tree.map(jnp.sum, each.bad))


def _is_plain_stack(base: Any, update: Any) -> bool:
    """Return whether the layers of a leaf on one device can be merged one after the other."""
    return (
        isinstance(update, LoraPair)
        and update.stack_axes[:1] == (0,)
        and not isinstance(update.scale, tuple)
        and update.magnitude is None
        and update.bias is None
        and isinstance(base, jax.Array)
        and _is_concrete((base, update))
        and len(base.sharding.device_set) == 1
    )


def _like(array: jax.Array, base: Any) -> jax.Array:
    """Give a merged weight the sharding of its base weight, as the compiler may choose another.

    An uncommitted base is skipped: `device_put` commits the result to its devices, and the merged
    weights could then not be used on a mesh on which the base can be used.
    """
    if not isinstance(base, jax.Array) or isinstance(array, Tracer) or not base.committed:
        return array
    return jax.device_put(array, base.sharding)


# -----------------------------------------------------------------------------------------------
# The tree
# -----------------------------------------------------------------------------------------------


def _with_update(tree: Any, adapter: Adapter, sign: int, *, donate: bool = False) -> Any:
    nodes, treedef = paths.flatten_with_paths(combine(tree, adapter), is_leaf=is_weight)
    leaves, reports = {}, {}
    used = collections.Counter(id(array) for array in jax.tree.leaves(tree)) if donate else {}
    for path, node in nodes:
        if is_adapted(node):
            base = as_array(node.base)
            merge_leaf = _merged_stack if _is_plain_stack(base, node.update) else _merged_leaf
            merged, reports[path] = merge_leaf(base, node.update, sign)
            if donate:
                _free(node.base, jax.block_until_ready(merged), used)
            node = _like(merged, base)
        leaves[path] = node
    function_name = "merge" if sign > 0 else "unmerge"
    leaves |= merge_biases(function_name, leaves, adapter.pairs, sign)
    concrete = {path: report for path, report in reports.items() if _is_concrete(report)}
    _check(function_name, concrete, adapter)
    return jax.tree.unflatten(treedef, list(leaves.values()))


def _free(base: Any, merged: Any, used: Mapping[int, int]) -> None:
    """Free the arrays of a base weight that no other leaf of the tree has."""
    for array in jax.tree.leaves(base):
        if _is_concrete(array) and isinstance(array, jax.Array) and array is not merged:
            if used[id(array)] == 1:
                array.delete()


def _is_concrete(tree: Any) -> bool:
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _check(function_name: str, reports: dict[str, _Report], adapter: Adapter) -> None:
    problems, lost, updates = [], [], adapter.updates
    for path, report in reports.items():
        called = updates[path].called
        for name, bad in report.bad.items():
            if int(bad):
                problems.append(f"{path}: {int(bad)} elements of {called(name)} are NaN or Inf")
        if float(report.overflown) and not any(map(int, report.bad.values())):
            problems.append(
                f"{path}: {float(report.overflown):.2%} of the merged elements overflow the type "
                "of the base"
            )
        share = float(report.lost) / max(float(report.changed), 1e-30)
        if share >= _LOST_SHARE_TO_WARN:
            lost.append((share, path))
    if problems:
        raise MergeError(
            f"{function_name}: {len(problems)} arrays are not finite",
            got=problems,
            expected="finite adapter weights and results; the base model is unchanged",
            fix="Use an earlier checkpoint, or merge into a base model of a wider type.",
        )
    if lost:
        _warn(function_name, sorted(lost, reverse=True))


def _warn(function_name: str, lost: Sequence[tuple[float, str]]) -> None:
    worst, path = lost[0]
    others = f" and {len(lost) - 1} other leaves" if len(lost) > 1 else ""
    warnings.warn(
        format_error(
            f"{function_name}: {path}{others}",
            got=f"{worst:.1%} of the changed elements rounded back to the value of the base",
            expected=f"under {_LOST_SHARE_TO_WARN:.0%}; the update is smaller than the rounding "
            "error of the base's type",
            fix="Merge into a float32 copy of the base, or use lora_apply without merging.",
        ),
        MergeWarning,
        stacklevel=5,  # the caller of merge or unmerge
    )
