"""summary: a table of the adapted leaves with ranks, scales and parameter counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jax_lora.adapter import Adapter, combine, is_weight, partition
from jax_lora.paths import flatten_with_paths
from jax_lora.printable import printable
from jax_lora.updates import LoraPair

_PATH_WIDTH = 48  # with the other columns, a line fits 100 characters


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One adapted leaf.

    Args:
      path: Path of the leaf.
      kind: `"lora"`, `"dora"`, `"whole"` for a fully trained leaf, or `"rows"` for trained rows of
        a table.
      shape: Shape of the base weight.
      rank: Rank of the pair (the largest in a layer stack), or None.
      scale: Smallest and largest scale in a layer stack, or None.
      trainable: Number of trainable parameters, without the padding of lower ranks.
      ranks: Smallest and largest rank in a layer stack, or None; 0 is a layer without an update.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    scale: tuple[float, float] | None
    trainable: int
    ranks: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Summary:
    """The size of an adapter and of its base model; `print` shows it as a table.

    Args:
      rows: A row per adapted leaf.
      trainable: Number of trainable parameters.
      total: Number of parameters of the base model and the adapter together.
      adapter_bytes: Size of the adapter in bytes.
      base_bytes: Size of the base model in bytes.
      experts: Number of experts with an update, and number of all experts of a layer; None if the
        base model has no experts.
    """

    rows: tuple[SummaryRow, ...]
    trainable: int
    total: int
    adapter_bytes: int
    base_bytes: int
    experts: tuple[int, int] | None = None

    @property
    def percent(self) -> float:
        """Share of trainable parameters in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        """Format rows and totals as text of at most 100 columns."""
        cells = [("leaf", "shape", "rank", "scale", "trainable"), *map(_cells, self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(5)]
        lines = [_line(row, widths) for row in cells]
        share = f"trainable {self.trainable:,} of {self.total:,} ({self.percent:.2f}%)"
        sizes = f"adapter {_size(self.adapter_bytes)}, base {_size(self.base_bytes)}"
        counts = [] if self.experts is None else ["experts: {} of {}".format(*self.experts)]
        rule = "-" * max(len(line) for line in [*lines, share, sizes])
        return "\n".join([lines[0], rule, *lines[1:], rule, share, *counts, sizes])


def summary(variables: Any, adapter: Adapter | None = None) -> Summary:
    """Count the parameters and bytes of an adapter and its base model.

    Use it after `lora_init` to check which kernels were selected and how many parameters are
    trainable. It needs only shapes and types: `jax.ShapeDtypeStruct`s are sufficient.

    Args:
      variables: The base parameters, or a tree from `combine`.
      adapter: The adapter; None if `variables` is a combined tree.

    Returns:
      A `Summary` with `rows` and totals; `print` shows it as a table.

    Raises:
      StructureError: The adapter does not fit the tree.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> params = {"q_proj": {"kernel": jnp.ones((512, 256))}, "norm": {"scale": jnp.ones(256)}}
      >>> config = jl.LoraConfig(rank=8, alpha=16.0)
      >>> print(summary(params, jl.lora_init(jax.random.key(0), params, config)))
      leaf           shape       rank  scale  trainable
      -------------------------------------------------
      q_proj/kernel  (512, 256)     8      2      6,144
      -------------------------------------------------
      trainable 6,144 of 137,472 (4.47%)
      adapter 24.6 kB, base 525.3 kB
    """
    base, adapter = partition(variables if adapter is None else combine(variables, adapter))
    leaves = dict(flatten_with_paths(base, is_leaf=is_weight)[0])
    rows = [_row(path, leaves[path], update) for path, update in adapter.updates.items()]
    return Summary(
        rows=tuple(rows),
        trainable=sum(row.trainable for row in rows),
        # A fully trained leaf replaces a base leaf; only factors add parameters.
        total=sum(map(_count, leaves.values()))
        + sum(row.trainable for row in rows if row.rank is not None),
        adapter_bytes=sum(map(_bytes, jax.tree.leaves(adapter))),
        base_bytes=sum(map(_bytes, jax.tree.leaves(base))),
        experts=_experts(leaves, adapter),
    )


def _experts(leaves: Mapping[str, Any], adapter: Adapter) -> tuple[int, int] | None:
    """Count the experts with an update in some layer, and all experts; the stacks end with them."""
    found = None
    for path, leaf in leaves.items():
        if "experts" not in path.split("/") or len(np.shape(leaf)) < 3:
            continue
        total, pair = leaf.shape[-3], adapter.pairs.get(path)
        adapted = 0
        if pair is not None:
            ranks = np.asarray(pair.rank if pair.ranks is None else pair.ranks)
            per_expert = ranks.ndim == leaf.ndim - 2
            each = ranks.reshape(-1, total).max(axis=0) if per_expert else ranks.max()
            adapted = int(np.count_nonzero(np.broadcast_to(each, total)))
        found = max(found or (0, 0), (adapted, total))
    return found


def _row(path: str, leaf: Any, update: Any) -> SummaryRow:
    row = SummaryRow(path, update.kind, tuple(leaf.shape), None, None, update.size)
    if not isinstance(update, LoraPair):
        return row
    scales = np.asarray(update.scale, float)
    ranks = np.asarray(update.rank if update.ranks is None else update.ranks)
    if scales.shape == ranks.shape and ranks.any():
        scales = scales[ranks > 0]  # a layer without an update has no scale
    return dataclasses.replace(
        row,
        rank=update.rank,
        scale=(float(scales.min()), float(scales.max())),
        ranks=(int(ranks.min()), int(ranks.max())),
    )


def _count(leaf: Any) -> int:
    return math.prod(np.shape(leaf) if np.isscalar(leaf) else leaf.shape)


def _bytes(leaf: Any) -> int:
    leaf = np.asarray(leaf) if np.isscalar(leaf) else leaf
    return _count(leaf) * leaf.dtype.itemsize


def _cells(row: SummaryRow) -> tuple[str, ...]:
    rank = row.kind if row.ranks is None else _range(row.ranks)
    return (_short(row.path), str(row.shape), rank, _range(row.scale), f"{row.trainable:,}")


def _range(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return "-"
    low, high = (f"{each:.4g}" for each in ends)
    return low if low == high else f"{low}..{high}"


def _short(path: str) -> str:
    """Shorten a long path in the middle, and escape control characters."""
    path = printable(path, keep="")
    if len(path) <= _PATH_WIDTH:
        return path
    half = (_PATH_WIDTH - 3) // 2
    return f"{path[:half]}...{path[len(path) - (_PATH_WIDTH - 3 - half) :]}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Format a row: the first two columns flush left, the others flush right."""
    names = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join([*names, *numbers])


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
