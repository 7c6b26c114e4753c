"""record: the uses of every leaf that `analyze` finds, and the kernels they imply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax_lora.algebra.named_axes import AxisName, Index, origins
from jax_lora.kernels.kernel import Kernel, Kernels
from jax_lora.transform.equations import UNKNOWN

Paths = frozenset[str]
NO_PATHS: Paths = frozenset()


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A variable that is a parameter, possibly moved, sliced or scaled."""

    path: str
    axes: tuple[AxisName | None, ...]
    shape: tuple[Any, ...]
    # Names of the axes along which an index that depends on data selects entries: rows of a table
    # or kernels of a stack, depending on the next operation.
    looked_up: tuple[AxisName | None, ...] = ()
    has_data: bool = False  # whether data was added to it, so that it may be a stream
    others: tuple[Leaf, ...] = ()  # combined with it elementwise; each can be adapted

    @property
    def all(self) -> tuple[Leaf, ...]:
        """The leaf and the others."""
        return (self, *self.others)

    def map(self, change: Callable[[Leaf], Leaf]) -> Leaf:
        """Apply a change to the leaf and the others."""
        return dataclasses.replace(change(self), others=tuple(map(change, self.others)))

    @property
    def is_matrix(self) -> bool:
        """Whether it has at least two axes apart from index axes."""
        axes = zip(self.axes, self.shape, strict=True)
        return (
            sum(n != 1 and name is not None and not isinstance(name, Index) for name, n in axes) > 1
        )

    @property
    def is_row(self) -> bool:
        """Whether it consists of looked-up rows of a table."""
        return bool(self.looked_up) and not self.is_matrix


@dataclasses.dataclass
class Uses:
    """The uses of one leaf. Sets of axes are axes of the leaf, numbered as in its shape."""

    shape: tuple[int, ...]
    dtype: Any
    why_excluded: str | None  # why it cannot be adapted, however it is used
    is_parameter: bool  # for which users may expect an adapter
    kinds: list[str] = dataclasses.field(default_factory=list)  # one per use
    summed: list[frozenset[int]] = dataclasses.field(default_factory=list)  # one per use
    stacked: frozenset[int] = frozenset()
    looked_up: frozenset[int] = frozenset()  # axes along which data selects entries
    flops: Any = 0
    used_at: str = UNKNOWN
    why_materialized: str | None = None
    materialized_matrix: bool = False  # whether that has two axes or more
    added: bool = False  # whether it was materialized to be added to data, like a bias
    contracted_after: bool = False  # whether data is contracted with what was computed from it
    contracted_entries: bool = False  # whether that was computed from looked-up entries
    touched: bool = False  # whether an operation reads it

    def use(self, kind: str, summed: Iterable[Any], flops: Any, where: str) -> None:
        """Record a use, with the names of the summed or looked-up axes."""
        self.kinds.append(kind)
        self.summed.append(origins_of(summed))
        self.flops += flops
        self.used_at = where

    def materialize(self, leaf: Leaf, why: str, *, added: bool = False) -> None:
        """Record that the leaf is materialized, perhaps only to be added to data."""
        # A scan over a stack of biases leaves one axis.
        is_matrix = len(origins_of(leaf.axes)) > 1
        if self.why_materialized is None or (is_matrix and not self.materialized_matrix):
            self.why_materialized, self.materialized_matrix = why, is_matrix
            self.added = added or leaf.has_data


class Record:
    """The uses of every leaf by path, and how the products of kernels are used."""

    def __init__(self) -> None:
        """Start without leaves."""
        self.uses: dict[str, Uses] = {}
        self.fed: set[str] = set()  # kernels whose products reach another kernel
        self.joined: set[str] = set()  # kernels whose products are combined with another stream
        self.sums: set[Paths] = set()  # kernels whose products are added to each other

    def results(self, returned: Sequence[Paths]) -> Kernels:
        """Return the kernels, and the skipped leaves with reasons.

        `returned` has, for every output of the function, the kernels whose product it is.
        """
        # A sum that is not an output of the function is a stream that its terms have joined.
        inner = [paths for paths in self.sums if not any(paths <= each for each in returned)]
        heads = NO_PATHS.union(*returned) - self.fed - self.joined - NO_PATHS.union(*inner)
        kernels, skipped, acting, added = {}, {}, set(), set()
        for path, uses in self.uses.items():
            kernel = _kernel(path, uses, path in heads)
            if kernel is not None and uses.why_excluded is None:
                kernels[path] = kernel
                if uses.kinds or not uses.contracted_entries:
                    continue  # otherwise it is adapted as a table, but its entries act as kernels
            if (why := _why_skipped(uses, kernel)) is not None:
                skipped[path] = why
                if uses.is_parameter and (kernel is not None or uses.contracted_after):
                    acting.add(path)
                elif uses.added:
                    added.add(path)
        return Kernels(kernels, skipped, frozenset(acting), frozenset(added))


def origins_of(names: Iterable[AxisName | None]) -> frozenset[int]:
    """Return the axes of the leaf that some names are derived from."""
    return frozenset().union(*map(origins, names))


def _kernel(path: str, uses: Uses, is_output_head: bool) -> Kernel | None:
    kinds, summed = uses.kinds, uses.summed
    if not kinds and uses.looked_up:
        kinds, summed = ["embedding"], [uses.looked_up]  # entries that are not kernels
    # A looked-up table is an embedding, even if a tied output head also contracts it.
    wanted = "embedding" if "embedding" in kinds else kinds[0] if kinds else ""
    splits = [_split(uses, s) for kind, s in zip(kinds, summed, strict=True) if kind == wanted]
    splits += [_split(uses, s, loose=True) for s in summed]
    split = next((each for each in splits if each is not None), None)
    if split is None:
        return None  # a vector has no low-rank update
    return Kernel(
        path, uses.shape, uses.dtype, wanted, *split,
        len(kinds), uses.flops, is_output_head and wanted == "dense",
    )  # fmt: skip


_Axes = tuple[int, ...]


def _split(
    uses: Uses, summed: frozenset[int], *, loose: bool = False
) -> tuple[_Axes, _Axes, _Axes] | None:
    """Split the axes of a leaf into inputs, outputs and stack, given the axes that a use sums.

    A loose split accepts a use without output axes: stack axes then become the outputs; if there
    are none, the last axis does.
    """
    axes = range(len(uses.shape))
    stacked = uses.stacked - summed
    outputs = {axis for axis in axes if axis not in summed and axis not in stacked}
    if loose and not outputs:
        by_size = sorted(axes, key=lambda axis: (uses.shape[axis] != 1, axis))
        outputs, stacked = (stacked, set()) if stacked else ({*by_size[1:][-1:]}, stacked)
    inputs = summed - outputs
    if not inputs or not outputs:
        return None
    return tuple(sorted(inputs)), tuple(sorted(outputs)), tuple(sorted(stacked))


def _why_skipped(uses: Uses, kernel: Kernel | None) -> str | None:
    matrix = sum(size != 1 for size in uses.shape) > 1
    why = uses.why_excluded
    if why is not None:
        if kernel is not None:
            return f"{why}; it is used at {uses.used_at}"
        return f"{why}; {uses.why_materialized}" if uses.contracted_after and matrix else None
    if uses.why_materialized is not None and uses.materialized_matrix:
        return uses.why_materialized
    unused = uses.touched and uses.why_materialized is None and not uses.kinds
    return "the function does not use the result" if unused and matrix else None
