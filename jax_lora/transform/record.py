"""record: the uses of every leaf that `analyze` finds, and the kernels they imply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax_lora.algebra.named_axes import AxisName, origins
from jax_lora.kernels.kernel import Kernel, Kernels
from jax_lora.transform.equations import UNKNOWN

Paths = frozenset[str]
NO_PATHS: Paths = frozenset()


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A variable that is a parameter, possibly moved, sliced or scaled.

    Args:
      path: Path of the leaf.
      axes: The name of every axis.
      shape: Current shape.
      looked_up: Names of the axes along which an index that depends on data selects entries: rows
        of a table or kernels of a stack, depending on the next operation.
      meets_data: Whether data was added to it, so that it may be a stream.
      others: Other leaves that were combined with it elementwise; each can be adapted.
    """

    path: str
    axes: tuple[AxisName | None, ...]
    shape: tuple[Any, ...]
    looked_up: tuple[AxisName | None, ...] = ()
    meets_data: bool = False
    others: tuple[Leaf, ...] = ()

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
        return sum(n != 1 and name is not None and not is_index(name) for name, n in axes) > 1

    @property
    def is_row(self) -> bool:
        """Whether it consists of looked-up rows of a table."""
        return bool(self.looked_up) and not self.is_matrix


@dataclasses.dataclass(frozen=True)
class Bar:
    """Why a leaf cannot be adapted, however it is used.

    Args:
      why: The reason.
      is_parameter: Whether it is a parameter, for which users may expect an adapter.
    """

    why: str
    is_parameter: bool


@dataclasses.dataclass
class _Uses:
    """The uses of one leaf."""

    shape: tuple[int, ...]
    dtype: Any
    bar: Bar | None
    kinds: list[str] = dataclasses.field(default_factory=list)
    summed: list[frozenset[int]] = dataclasses.field(default_factory=list)
    stacked: set[int] = dataclasses.field(default_factory=set)
    flops: Any = 0
    used_at: str = UNKNOWN
    lost: str | None = None
    lost_a_matrix: bool = False
    looked_up: frozenset[int] = frozenset()  # axes along which data selects entries
    added: bool = False  # whether it was materialized to be added to data, like a bias
    contracted_after: bool = False
    contracted_entries: bool = False
    touched: bool = False


class Record:
    """The uses of every leaf."""

    def __init__(self) -> None:
        """Start without leaves."""
        self._uses: dict[str, _Uses] = {}
        self._fed: set[str] = set()  # kernels whose products reach another kernel
        self._joined: set[str] = set()  # kernels whose products are combined with another stream
        self._sums: set[Paths] = set()  # kernels whose products are added to each other

    def leaf(self, path: str, shape: Sequence[int], dtype: Any, bar: Bar | None) -> Leaf:
        """Add a leaf."""
        self._uses[path] = _Uses(tuple(shape), dtype, bar)
        return Leaf(path, tuple(range(len(shape))), tuple(shape))

    def touch(self, path: str) -> None:
        """Record that an operation reads a leaf."""
        self._uses[path].touched = True

    def stack(self, path: str, names: Iterable[AxisName | None]) -> None:
        """Record stack axes."""
        self._uses[path].stacked |= origins_of(names)

    def use(self, leaf: Leaf, kind: str, summed: Iterable[Any], flops: Any, where: str) -> None:
        """Record a use, with the names of the summed or looked-up axes."""
        uses = self._uses[leaf.path]
        uses.kinds.append(kind)
        uses.summed.append(origins_of(summed))
        uses.flops += flops
        uses.used_at = where

    def look_up(self, path: str, names: Iterable[AxisName | None]) -> None:
        """Record that entries are selected along axes: rows, unless they are used as kernels."""
        self._uses[path].looked_up |= origins_of(names)

    def lose(self, leaf: Leaf, why: str, *, added: bool = False) -> None:
        """Record that a leaf is materialized, perhaps only to be added to data."""
        uses = self._uses[leaf.path]
        # A scan over a stack of biases leaves one axis.
        is_matrix = len(origins_of(leaf.axes)) > 1
        if uses.lost is None or (is_matrix and not uses.lost_a_matrix):
            uses.lost, uses.lost_a_matrix = why, is_matrix
            uses.added = added or leaf.meets_data

    def contract_lost(self, lost: Paths, entries: Paths) -> None:
        """Record that data is contracted with arrays computed from materialized leaves."""
        for path in lost | entries:
            self._uses[path].contracted_after = True
            self._uses[path].contracted_entries |= path in entries

    def feed(self, data: Paths) -> None:
        """Record that the products of some kernels reach another kernel."""
        self._fed |= data

    def join(self, paths: Paths) -> None:
        """Record that the products of some kernels are combined with another stream."""
        self._joined |= paths

    def add_up(self, paths: Paths) -> None:
        """Record that the products of some kernels are added to each other."""
        self._sums.add(paths)

    def results(self, returned: Sequence[Paths]) -> Kernels:
        """Return the kernels, and the skipped leaves with reasons.

        Args:
          returned: For every output of the function, the kernels whose product it is.
        """
        # A sum that is not an output of the function is a stream that its terms have joined.
        inner = [paths for paths in self._sums if not any(paths <= each for each in returned)]
        heads = NO_PATHS.union(*returned) - self._fed - self._joined - NO_PATHS.union(*inner)
        kernels, skipped, acting, added = {}, {}, set(), set()
        for path, uses in self._uses.items():
            kernel = _kernel(path, uses, path in heads)
            if kernel is not None and uses.bar is None:
                kernels[path] = kernel
                if uses.kinds or not uses.contracted_entries:
                    continue  # otherwise it is adapted as a table, but its entries act as kernels
            if (why := _why_skipped(uses, kernel)) is not None:
                skipped[path] = why
                is_parameter = uses.bar is None or uses.bar.is_parameter
                if is_parameter and (kernel is not None or uses.contracted_after):
                    acting.add(path)
                elif uses.added:
                    added.add(path)
        return Kernels(kernels, skipped, frozenset(acting), frozenset(added))


def origins_of(names: Iterable[AxisName | None]) -> frozenset[int]:
    """Return the axes of the leaf that some names originate from."""
    return frozenset().union(*map(origins, names))


def is_index(name: AxisName) -> bool:
    """Tell whether a name belongs to an index axis."""
    return isinstance(name, tuple) and name[0] == "index"


def _kernel(path: str, uses: _Uses, is_output_head: bool) -> Kernel | None:
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
    uses: _Uses, summed: frozenset[int], *, loose: bool = False
) -> tuple[_Axes, _Axes, _Axes] | None:
    """Split the axes of a leaf into inputs, outputs and stack, given the axes that a use sums.

    Args:
      uses: The leaf.
      summed: The axes that the use sums over.
      loose: Whether to accept a use without output axes: stack axes then become the outputs; if
        there are none, the last axis does.

    Returns:
      The input, output and stack axes, or None.
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


def _why_skipped(uses: _Uses, kernel: Kernel | None) -> str | None:
    matrix = sum(size != 1 for size in uses.shape) > 1
    if uses.bar is not None:
        if kernel is not None:
            return f"{uses.bar.why}; it is used at {uses.used_at}"
        return f"{uses.bar.why}; {uses.lost}" if uses.contracted_after and matrix else None
    if uses.lost is not None and uses.lost_a_matrix:
        return uses.lost
    unused = uses.touched and uses.lost is None and not uses.kinds
    return "the function does not use the result" if unused and matrix else None
