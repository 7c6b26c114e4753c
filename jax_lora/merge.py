"""merge and unmerge: an adapter's update added to the base weights, or taken off again."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jax_lora import paths
from jax_lora.adapter import Adapter, combine, is_adapted, is_weight
from jax_lora.algebra.base_weight import made
from jax_lora.errors import MergeError, MergeWarning, format_error
from jax_lora.folded_bias import fold_biases

# A hundredth of W0, a usual update, loses a quarter of its entries in bfloat16, the smallest ones.
_LOST_SHARE_WORTH_A_WARNING = 0.5


def merge(variables: Any, adapter: Adapter) -> Any:
    """Add an adapter to its base: plain parameters, W0 + scale * a @ b, with magnitudes applied.

    Use it to run or export a trained model without `lora_apply`: same shapes, same speed as the
    base. `variables` stay as they are. Each weight is computed in float32 (float64 for a float64
    base) and rounded once to W0's own type. Works under `jax.jit`, where the checks of values
    are left out. Sharded weights stay sharded as they were.

    Args:
      variables: The tree that the adapter was made for.
      adapter: The adapter.

    Returns:
      The same tree, with the same treedef, shapes and types, and other values.

    Raises:
      MergeError: A factor is not finite, a sum is beyond the range of W0's type, or a pair has a
        bias and its layer none to add it to; the message names every such leaf.
      StructureError: The adapter does not fit the tree.

    Warns:
      MergeWarning: W0's type is so coarse that half or more of the changed entries of a leaf
        are rounded back to W0. The message says how large the share is.

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
    return _with_update(variables, adapter, sign=1)


def unmerge(merged: Any, adapter: Adapter) -> Any:
    """Take an adapter off a merged tree again: W - scale * a @ b.

    Use it where no copy of the base is left. It is exact up to rounding only: each entry comes
    back within eps * (|W0| + |delta|), eps being that of W0's type (1.2e-7 for float32, 7.8e-3
    for bfloat16). Keep the base `variables`, which `merge` does not touch, to have them bitwise.

    Args:
      merged: A tree from `merge`.
      adapter: The adapter that was merged.

    Returns:
      The base, up to rounding.

    Raises:
      MergeError: A factor is not finite, or the adapter has leaves trained whole or magnitudes:
        no merged tree holds the base values of the first, or the norms that the second replaced.
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
            format_error(
                f"unmerge: {', '.join(lost)}",
                got="; ".join(dict.fromkeys(lost.values())),
                expected="an adapter of pairs without magnitudes",
                fix="Use the base variables themselves: merge left them unchanged.",
            )
        )
    return _with_update(merged, adapter, sign=-1)


# -----------------------------------------------------------------------------------------------
# One leaf
# -----------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Report:
    """What the numbers of one merged leaf say, as scalars that are read only outside jit."""

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


def _like(array: jax.Array, base: Any) -> jax.Array:
    """Put a result where its base is, unless that may go to any device.

    The compiler may have chosen another layout. Moving an array binds it to its devices, which
    would keep merged weights from running on a mesh that the base runs on.
    """
    if not isinstance(base, jax.Array) or isinstance(array, Tracer) or not base.committed:
        return array
    return jax.device_put(array, base.sharding)


# -----------------------------------------------------------------------------------------------
# The tree
# -----------------------------------------------------------------------------------------------


def _with_update(tree: Any, adapter: Adapter, sign: int) -> Any:
    nodes, treedef = paths.flatten_with_paths(combine(tree, adapter), is_leaf=is_weight)
    leaves, reports = {}, {}
    for path, node in nodes:
        if is_adapted(node):
            base = made(node.base)
            merged, reports[path] = _merged_leaf(base, node.update, sign)
            node = _like(merged, base)
        leaves[path] = node
    verb = "merge" if sign > 0 else "unmerge"
    leaves |= fold_biases(verb, leaves, adapter.pairs, sign)
    concrete = {path: report for path, report in reports.items() if _is_concrete(report)}
    _check(verb, concrete, adapter)
    return jax.tree.unflatten(treedef, list(leaves.values()))


def _is_concrete(tree: Any) -> bool:
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _check(verb: str, reports: dict[str, _Report], adapter: Adapter) -> None:
    problems, lost, updates = [], [], adapter.updates
    for path, report in reports.items():
        called = updates[path].called
        for name, bad in report.bad.items():
            if int(bad):
                problems.append(f"{path}: {int(bad)} entries of {called(name)} are NaN or Inf")
        if float(report.overflown) and not any(map(int, report.bad.values())):
            problems.append(
                f"{path}: {float(report.overflown):.2%} of the sums are beyond the base's type"
            )
        share = float(report.lost) / max(float(report.changed), 1e-30)
        if share >= _LOST_SHARE_WORTH_A_WARNING:
            lost.append((share, path))
    _refuse(verb, problems)
    if lost:
        _warn(verb, sorted(lost, reverse=True))


def _refuse(verb: str, problems: Sequence[str]) -> None:
    if problems:
        raise MergeError(
            format_error(
                f"{verb}: {len(problems)} factors or sums are not finite",
                got="\n" + "\n".join(f"    {problem}" for problem in problems),
                expected="finite numbers; the base is as it was",
                fix="Go back to an earlier checkpoint, or merge into a wider type.",
            )
        )


def _warn(verb: str, lost: Sequence[tuple[float, str]]) -> None:
    worst, path = lost[0]
    others = f" and {len(lost) - 1} other leaves" if len(lost) > 1 else ""
    warnings.warn(
        format_error(
            f"{verb}: {path}{others}",
            got=f"{worst:.1%} of the changed entries rounded back to the base's own value",
            expected=f"under {_LOST_SHARE_WORTH_A_WARNING:.0%}; the updates are smaller than half "
            "a unit in the last place of the base's type",
            fix="Merge into a float32 copy of the base, or keep base and adapter apart.",
        ),
        MergeWarning,
        stacklevel=5,  # the caller of merge or unmerge
    )
