"""summary: what an adapter trains, of how much, as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_lora.adapter import Adapter, combine, is_weight, partition
from jax_lora.paths import flatten_with_paths
from jax_lora.updates import LoraPair

_PATH_WIDTH = 48  # with the other columns, a line fits 100 characters


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One adapted leaf.

    Args:
      path: Its path.
      kind: `"lora"`, `"dora"` for a pair with a magnitude, `"whole"` for a leaf trained whole, or
        `"rows"` for a table of which some rows are.
      shape: Its shape in the base.
      rank: Rank of the pair (the largest of a stack), or None.
      scale: Scale of the pair (the range of a stack's, smallest first), or None.
      trainable: Numbers that are trained; zeros that pad a lower rank are none.
      ranks: The smallest and the largest rank of a stack, or None; 0 is a layer left out.
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
    """What an adapter trains; `print` shows it as a table.

    Args:
      rows: A row per adapted leaf.
      trainable: Numbers that are trained.
      total: Numbers of the base and the factors together.
      adapter_bytes: Size of the adapter.
      base_bytes: Size of the base.
    """

    rows: tuple[SummaryRow, ...]
    trainable: int
    total: int
    adapter_bytes: int
    base_bytes: int

    @property
    def percent(self) -> float:
        """Share of the numbers that is trained, in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        """Lay the rows and totals out as plain text of at most 100 columns."""
        cells = [("leaf", "shape", "rank", "scale", "trainable"), *map(_cells, self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(5)]
        lines = [_line(row, widths) for row in cells]
        share = f"trainable {self.trainable:,} of {self.total:,} ({self.percent:.2f}%)"
        sizes = f"adapter {_size(self.adapter_bytes)}, base {_size(self.base_bytes)}"
        rule = "-" * max(len(line) for line in [*lines, share, sizes])
        return "\n".join([lines[0], rule, *lines[1:], rule, share, sizes])


def summary(variables: Any, adapter: Adapter | None = None) -> Summary:
    """Count what an adapter trains and what it costs.

    Use it after `lora_init` to see which kernels were chosen, and how much is trained. Nothing is
    computed: `jax.ShapeDtypeStruct`s do as well as arrays.

    Args:
      variables: The base, or a tree from `combine`, which needs no `adapter`.
      adapter: The adapter.

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
        # A leaf trained whole replaces one of the base's; factors are added to it.
        total=sum(map(_count, leaves.values()))
        + sum(row.trainable for row in rows if row.rank is not None),
        adapter_bytes=sum(map(_bytes, jax.tree.leaves(adapter))),
        base_bytes=sum(map(_bytes, jax.tree.leaves(base))),
    )


def _row(path: str, leaf: Any, update: Any) -> SummaryRow:
    row = SummaryRow(path, update.kind, tuple(leaf.shape), None, None, update.size)
    return row if getattr(update, "rank", None) is None else _with_ranks(row, update)


def _with_ranks(row: SummaryRow, pair: LoraPair) -> SummaryRow:
    scales = np.asarray(pair.scale, float)
    ranks = np.asarray(pair.rank if pair.ranks is None else pair.ranks)
    if scales.shape == ranks.shape and ranks.any():
        scales = scales[ranks > 0]  # a layer left out has no scale
    return dataclasses.replace(
        row,
        rank=pair.rank,
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
    """Keep both ends of a long path, and nothing that a terminal would act on."""
    path = "".join(letter if letter.isprintable() else "?" for letter in path)
    if len(path) <= _PATH_WIDTH:
        return path
    half = (_PATH_WIDTH - 3) // 2
    return f"{path[:half]}...{path[len(path) - (_PATH_WIDTH - 3 - half) :]}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Lay out a row: names to the left, numbers to the right."""
    names = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join([*names, *numbers])


def _size(count: int) -> str:
    units: Sequence[tuple[float, str]] = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    for unit, name in units:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
