"""analyze: the interpretation behind `find_kernels`. It propagates the names of axes only.

Weights move by the same rules as in `evaluate`. Where a weight is contracted, the names of the
summed axes determine which axes are inputs. Where a weight would be materialized, the source line
and the reason are recorded. Any other variable is a stream: data on its way from kernel to kernel.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jax_lora.transform.abstract import Abstract
from jax_lora.transform.equations import UNKNOWN, location
from jax_lora.transform.record import NO_PATHS, Leaf, Paths, Record, origins_of
from jax_lora.transform.rules import Operand, Rule, Use


@dataclasses.dataclass(frozen=True)
class Stream:
    """A variable that is not a weight."""

    size: Any = 1  # number of elements before broadcasting
    external: bool = False  # whether it depends on data other than the parameters
    heads: Paths = NO_PATHS  # kernels whose product it is, up to a bias, a cast or a soft cap
    after: Paths = NO_PATHS  # kernels whose products it depends on
    from_parameters: bool = False  # whether it depends on parameters
    # If it depends on parameters only: leaves that were materialized to compute it, and leaves of
    # which entries were looked up.
    materialized: Paths = NO_PATHS
    entries: Paths = NO_PATHS


Value = Leaf | Stream

# A product remains the output of an output head after these operations.
_HEAD_PRESERVING = frozenset(
    "add sub mul div tanh neg convert_element_type copy stop_gradient name select_n "
    "sharding_constraint optimization_barrier reshape transpose squeeze broadcast_in_dim slice "
    "dynamic_slice split".split()
)
_BROADCASTS = frozenset(("broadcast_in_dim", "convert_element_type", "reshape"))
# These combine the output of a layer with the stream into the next layers.
_JOINS = frozenset(("add", "sub", "concatenate"))
_CONTRACTIONS = frozenset(
    "dot_general ragged_dot ragged_dot_general conv_general_dilated gather".split()
)
# These multiply data by a matrix as well, or may do so where the analysis cannot look inside.
_OPAQUE = frozenset(
    "triangular_solve tridiagonal_solve custom_linear_solve linear_call pure_callback io_callback "
    "ffi_call pallas_call scaled_matmul scaled_matmul_wrapper".split()
)


@dataclasses.dataclass(eq=False)
class Analyze(Abstract[Value]):
    """Propagates the names of the axes of weights."""

    record: Record
    times: int = 1  # how often the jaxpr runs: the length of the scans around it
    called_at: str = UNKNOWN  # source line of the call, if the jaxpr is inside another one

    def constant(self, array: Any) -> Value:
        """Describe a constant."""
        size = math.prod(getattr(array, "shape", ()))
        return Stream(size, external=size != 1)  # an array in the closure of the function is data

    def concerns(self, inputs: Sequence[Value]) -> bool:
        """Tell whether an input depends on a leaf: sub-jaxprs are opened for streams as well."""
        return any(
            isinstance(value, Leaf) or value.after or value.materialized or value.entries
            for value in inputs
        )

    def move(self, eqn: Any, rule: Rule, inputs: Sequence[Any]) -> list[Value] | None:
        """Move the names."""
        leaves = [i for i, value in enumerate(inputs) if isinstance(value, Leaf)]
        if rule.move is None or not leaves:
            return None
        if len(inputs) > 1 and not rule.each:
            streams = [value for value in inputs if isinstance(value, Stream)]
            # Next to the product of a kernel, a vector is a bias or an embedding, not a weight.
            joins = any(value.heads for value in streams)
            leaves = [i for i in leaves if inputs[i].is_matrix or not joins]
        moved = {position: self._moved(eqn, rule, inputs, position) for position in leaves}
        if not any(moved.values()):
            return None
        rest = [
            value if moved.get(i) else self.materialized(value, eqn, eqn.primitive.name)
            for i, value in enumerate(inputs)
        ]
        outputs = self._streams(eqn, rest)
        for result in moved.values():
            for place, leaf in (result or {}).items():
                outputs[place] = _combined(outputs[place], leaf)
        return outputs

    def consume(
        self, eqns: Sequence[Any], rule: Rule, inputs: Sequence[Sequence[Value]]
    ) -> list[list[Value] | None]:
        """Record how weights are used."""
        return [self._consume(eqn, rule, each) for eqn, each in zip(eqns, inputs, strict=True)]

    def without_rule(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        """Record that leaves are materialized."""
        name = eqn.primitive.name
        return self._streams(eqn, [self.materialized(value, eqn, name) for value in inputs])

    def inside(self, eqn: Any, times: int = 1) -> Analyze:
        """Share the record, and multiply the number of runs."""
        return Analyze(self.record, self.times * times, self._locate(eqn))

    def unrecorded(self) -> Analyze:
        """Use a copy of the record."""
        return Analyze(copy.deepcopy(self.record), self.times, self.called_at)

    def join(self, values: Sequence[Value]) -> Value:
        """Describe a value that is one of several."""
        if all(value == values[0] for value in values):
            return values[0]
        streams = [_as_stream(value) for value in values]
        heads = [each.heads for each in streams]
        return replace(_union(streams), heads=frozenset.intersection(*heads))

    def sliced(self, value: Value) -> Value:
        """Describe a slice: the first axis is a stack axis."""
        if isinstance(value, Stream):
            return value
        for leaf in value.all:
            self.record.uses[leaf.path].stacked |= origins_of(leaf.axes[:1])
        return value.map(lambda leaf: replace(leaf, axes=leaf.axes[1:], shape=leaf.shape[1:]))

    def stacked(self, value: Value, eqn: Any) -> Value:
        """Describe a stack: matrices stay weights, and vectors are materialized."""
        if isinstance(value, Stream):
            return value
        if sum(name is not None for name in value.axes) < 2:
            return self.materialized(value, eqn, "scan")
        name, length = ("scan", 0), eqn.params["length"]
        return value.map(
            lambda leaf: replace(leaf, axes=(name, *leaf.axes), shape=(length, *leaf.shape))
        )

    def materialized(self, value: Value, eqn: Any, operation: str) -> Stream:
        """Record that a leaf is materialized."""
        if isinstance(value, Stream):
            return value
        streams = [self._materialize(leaf, operation, self._locate(eqn)) for leaf in value.all]
        return replace(_union(streams), size=math.prod(value.shape))

    def _materialize(self, leaf: Leaf, operation: str, where: str) -> Stream:
        uses = self.record.uses[leaf.path]
        if leaf.is_row:
            uses.use("embedding", leaf.looked_up, 0, where)
            return Stream(external=True, from_parameters=True)
        why = f"the operation {operation} has no low-rank rule at {where}"
        uses.materialize(leaf, why, added=operation in ("add", "sub"))
        path = frozenset({leaf.path})
        materialized = {"entries" if leaf.looked_up else "materialized": path}
        return Stream(external=leaf.has_data, from_parameters=True, **materialized)

    def _locate(self, eqn: Any) -> str:
        return location(eqn, self.called_at)

    def _moved(
        self, eqn: Any, rule: Rule, inputs: Sequence[Any], position: int
    ) -> dict[int, Leaf] | None:
        """Move one operand; the result maps outputs to leaves."""
        value = inputs[position]
        rest = [other for i, other in enumerate(inputs) if i != position]
        moved: dict[int, Leaf] = {}
        for leaf in value.all:
            moves = rule.move(Operand(eqn, position, leaf.axes)) if rule.move else None
            if moves is None:
                return None
            self.record.uses[leaf.path].touched = True
            places = [position] if rule.each else range(len(moves))
            for place, move in zip(places, moves, strict=True):
                added = move.adds and any(_is_data(other, leaf) for other in rest)
                shape, has_data = eqn.outvars[place].aval.shape, leaf.has_data or added
                after = Leaf(leaf.path, move.axes, shape, leaf.looked_up, has_data)
                moved[place] = _combined(moved.get(place), self._record_selection(eqn, leaf, after))
        return moved

    def _record_selection(self, eqn: Any, before: Leaf, after: Leaf) -> Leaf:
        """Record the axes of which one entry is left as stack axes.

        If the index depends on data, the leaf may be an embedding table; its use decides.
        """
        left = dict(zip(after.axes, after.shape, strict=True))
        removed = [
            name
            for name, size in zip(before.axes, before.shape, strict=True)
            if name is not None and size != 1 and left.get(name, size) == 1
        ]
        if eqn.primitive.name in ("gather", "unstack"):  # the axis itself is removed
            removed += [name for name in before.axes if name is not None and name not in left]
        uses = self.record.uses[before.path]
        if eqn.primitive.name in ("slice", "unstack"):
            uses.stacked |= origins_of(removed)
            return after
        uses.looked_up |= origins_of(removed)  # rows, unless they are used as kernels
        return replace(after, looked_up=(*after.looked_up, *removed))

    def _consume(self, eqn: Any, rule: Rule, inputs: Sequence[Any]) -> list[Value] | None:
        inputs = self._data_materialized(eqn, inputs)
        reads = {
            position: [(leaf, self._read(eqn, rule, position, leaf)) for leaf in value.all]
            for position, value in enumerate(inputs)
            if isinstance(value, Leaf)
        }
        uses = {i: pairs for i, pairs in reads.items() if any(use for _, use in pairs)}
        rest = [
            value if position in uses else self.materialized(value, eqn, eqn.primitive.name)
            for position, value in enumerate(inputs)
        ]
        if not uses:
            return self._streams(eqn, rest)
        out = self._stream(eqn, 0, rest)
        for leaf, use in itertools.chain.from_iterable(uses.values()):
            if use is None:
                self._materialize(leaf, eqn.primitive.name, self._locate(eqn))
            else:
                recorded = self.record.uses[leaf.path]
                recorded.stacked |= origins_of((*use.batched, *leaf.looked_up))
                flops = 2 * self.times * math.prod(eqn.outvars[0].aval.shape) * use.terms
                recorded.use(use.kind, use.summed, flops, self._locate(eqn))
                self.record.fed |= _as_stream(inputs[use.data]).after
        used = frozenset(leaf.path for pairs in uses.values() for leaf, _ in pairs)
        return [Stream(out.size, out.external, used, out.after | used, from_parameters=True)]

    def _read(self, eqn: Any, rule: Rule, position: int, leaf: Leaf) -> Use | None:
        use = rule.read(Operand(eqn, position, leaf.axes)) if rule.read is not None else None
        return use if use is not None and origins_of(use.summed) else None

    def _data_materialized(self, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
        """Treat a leaf to which data was added as data if another operand is the weight."""
        leaves = [value for value in inputs if isinstance(value, Leaf)]
        weights = [leaf for leaf in leaves if not leaf.has_data]
        result = list(inputs)
        for place, value in enumerate(inputs):
            if not isinstance(value, Leaf):
                continue
            if value.is_row:
                result[place] = self.materialized(value, eqn, eqn.primitive.name)
            elif value.has_data and weights:
                why = f"data is added to it, and {weights[0].path} multiplies the sum at"
                for leaf in value.all:
                    self.record.uses[leaf.path].materialize(leaf, f"{why} {self._locate(eqn)}")
                result[place] = Stream(math.prod(value.shape), external=True, from_parameters=True)
        return result

    def _streams(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        return [self._stream(eqn, place, inputs) for place in range(len(eqn.outvars))]

    def _stream(self, eqn: Any, place: int, inputs: Sequence[Value]) -> Stream:
        """Describe an output of an operation on streams, and record where streams join."""
        streams = [_as_stream(value) for value in inputs]
        size = math.prod(getattr(eqn.outvars[place].aval, "shape", ()))
        name = eqn.primitive.name
        if name in _JOINS or name in _CONTRACTIONS:
            self._join(name, size, inputs)
        multiplies = name in _CONTRACTIONS or name in _OPAQUE
        if multiplies and any(each.external for each in streams):
            for each in streams:
                for path in each.materialized | each.entries:
                    self.record.uses[path].contracted_after = True
                    self.record.uses[path].contracted_entries |= path in each.entries
        union = _union(streams)
        keeps_head = name in _HEAD_PRESERVING and all(_is_small(each, size) for each in inputs)
        kept = [each for each in streams if not union.external or each.size == size]
        return replace(
            union,
            size=streams[0].size if name in _BROADCASTS and len(streams) == 1 else size,
            heads=union.heads if keeps_head else NO_PATHS,
            materialized=NO_PATHS.union(*(each.materialized for each in kept)),
            entries=NO_PATHS.union(*(each.entries for each in kept)),
        )

    def _join(self, name: str, size: Any, inputs: Sequence[Value]) -> None:
        """Record the kernels whose products are combined with another stream."""
        streams = [value for value in inputs if isinstance(value, Stream)]
        for value in streams:
            for other in streams:
                is_stream = other.external and other.from_parameters
                is_stream = is_stream and (name != "add" or not _is_less(other, size))
                if other is value or not is_stream:
                    continue
                if value.heads and other.heads:
                    self.record.sums.add(value.heads | other.heads)
                else:
                    self.record.joined |= value.after - other.after


def _as_stream(value: Value) -> Stream:
    if isinstance(value, Stream):
        return value
    return Stream(math.prod(value.shape), value.has_data, from_parameters=True)


def _union(streams: Sequence[Stream]) -> Stream:
    every = lambda field: NO_PATHS.union(*(getattr(each, field) for each in streams))  # noqa: E731
    return Stream(
        size=max((each.size for each in streams if isinstance(each.size, int)), default=1),
        external=any(each.external for each in streams),
        heads=every("heads"),
        after=every("after"),
        from_parameters=any(each.from_parameters for each in streams),
        materialized=every("materialized"),
        entries=every("entries"),
    )


def _combined(first: Value | None, other: Leaf) -> Leaf:
    """Add a leaf to the leaves that it was combined with, if any."""
    if not isinstance(first, Leaf):
        return other
    return replace(first, others=(*first.others, *other.all))


def _is_external(value: Value) -> bool:
    if isinstance(value, Stream):
        return value.external
    return value.has_data or value.is_row


def _is_data(value: Value, leaf: Leaf) -> bool:
    """Tell whether a sum with a leaf may be data: not if what is added is broadcast to the leaf."""
    if isinstance(value, Stream) and _is_less(value, math.prod(leaf.shape)):
        return False
    return _is_external(value)


def _is_small(value: Value, size: Any) -> bool:
    """Tell whether an operand is a product, a bias, a mask or a scalar, not another stream."""
    if isinstance(value, Leaf) or value.heads or not value.external:
        return True  # parameters only, however small the product
    return _is_less(value, size)


def _is_less(value: Stream, size: Any) -> bool:
    if isinstance(value.size, int) and isinstance(size, int):
        return value.size < size or size == 1
    return isinstance(value.size, int)  # a stream has the symbolic size
