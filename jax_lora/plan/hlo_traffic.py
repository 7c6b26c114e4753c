"""Count the memory traffic and the collectives of a compiled function, from its optimized HLO.

XLA's own cost analysis counts the body of a loop once, and reports nothing for a GPU. Here every
operation reads its operands and writes its results once, times the iterations of the loops around
it. An operand of which a fusion reads slices only counts as these slices, and an update in place as
what it writes. Arrays in on-chip memory count nothing, nor does the traffic inside a custom kernel;
the workspace of a GPU library counts as written, which is an upper bound.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_ARRAY = re.compile(rf"\b({'|'.join(_BITS)})\[([\d,]*)\](\{{[^}}]*\}})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAMES = re.compile(r"%([\w.\-]+)")
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all iota partition-id replica-id"
    " optimization-barrier".split()
)
_CALLS = {"call", "conditional", "async-start"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_VIEWS = {"bitcast", "reshape"}
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of HLO."""

    name: str
    is_root: bool  # whether it is the result of its computation
    result: str  # type of the result, as text
    kind: str  # "dot", "fusion", ...
    operands: tuple[str, ...]  # their names
    argument: str  # text between the parentheses, such as the number of a parameter
    rest: str  # attributes, as text

    def attribute(self, name: str) -> str | None:
        """Return the computation that an attribute names."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match and match[1]


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind."""

    count: int  # how many run
    bytes: float  # of their results


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a compiled function moves, on one device."""

    bytes: float  # memory traffic
    collectives: dict[str, Collective]  # by kind


def hlo_traffic(text: str) -> Traffic:
    """Count the traffic of a compiled function from `compiled.as_text()`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compiled = jax.jit(jnp.sin).lower(jnp.zeros(1000)).compile()
      >>> hlo_traffic(compiled.as_text()).bytes  # read and written
      8000.0
    """
    module = _Module(text)
    total, collectives = 0.0, dict[str, Collective]()
    for computation, operation, count in module.operations():
        kind = operation.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            seen = collectives.get(kind, Collective(0, 0.0))
            size = module.collective_bytes(operation)
            collectives[kind] = Collective(seen.count + count, seen.bytes + size * count)
        total += module.traffic(computation, operation) * count
    return Traffic(total, collectives)


def array_bytes(text: str, *, on_chip: bool = True) -> float:
    """Sum the bytes of the arrays in a type, with or without those in on-chip memory.

    Example:
      >>> array_bytes("(f32[2,3]{1,0}, s32[])")
      28.0
    """
    return sum(_sizes(text, on_chip))


def _sizes(text: str, on_chip: bool = True) -> Iterator[float]:
    for dtype, dims, layout in _ARRAY.findall(text):
        counts = on_chip or "S(" not in layout
        sizes = [int(size) for size in dims.split(",") if size]
        yield math.prod(sizes) * _BITS[dtype] / 8 if counts else 0.0


class _Module:
    """The computations of a module."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Operation]] = {}
        self.entry = ""
        current: dict[str, Operation] = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif match := _OPERATION.match(line):
                operation = _read(*match.groups())
                current[operation.name] = operation

    def operations(self) -> Iterator[tuple[Mapping[str, Operation], Operation, int]]:
        """Go through the operations that run, with how often each runs."""
        waiting = [(self.entry, 1)]
        while waiting:
            name, count = waiting.pop()
            computation = self.computations.get(name, {})
            for operation in computation.values():
                if operation.kind == "while":
                    body = operation.attribute("body")
                    waiting.append((body or "", count * self._iterations(operation)))
                elif operation.kind in _CALLS:
                    called = _NAMES.findall(operation.rest)
                    waiting += [(each, count) for each in called if each in self.computations]
                else:
                    yield computation, operation, count

    def _iterations(self, loop: Operation) -> int:
        if known := re.search(r"known_trip_count\D*(\d+)", loop.rest):
            return int(known[1])
        # Without it, the largest constant that the condition compares to.
        condition = self.computations.get(loop.attribute("condition") or "", {})
        constants = [each.argument for each in condition.values() if each.kind == "constant"]
        return max([int(each) for each in constants if each.isdecimal()], default=1)

    def collective_bytes(self, operation: Operation) -> float:
        """Size of a collective's results; the start of one may list its operands before them."""
        sizes, count = list(_sizes(operation.result)), len(operation.operands)
        if operation.kind.endswith("-start") and len(sizes) >= 2 * count:
            sizes = sizes[count : 2 * count]
        return sum(sizes)

    def traffic(self, computation: Mapping[str, Operation], operation: Operation) -> float:
        """Bytes that an operation reads and writes."""
        kind = operation.kind
        if kind in _FREE or kind.endswith("-done") or "AllocateBuffer" in operation.rest:
            return 0.0
        written = array_bytes(operation.result, on_chip=False)
        if kind in ("fusion", "fusion-start"):
            return self._fusion_traffic(computation, operation, written)
        if kind.endswith("-start"):  # its type lists what is read beside what is written
            return written
        if kind in _SLICES:
            return 2 * written
        if kind == "dynamic-update-slice":
            return 2 * _operand_bytes(computation, operation.operands[1])
        return written + sum(_operand_bytes(computation, each) for each in operation.operands)

    def _fusion_traffic(
        self, computation: Mapping[str, Operation], operation: Operation, written: float
    ) -> float:
        name = operation.attribute("calls") or ""
        updates = self._updated_bytes(name)
        if updates is not None and written > 0:
            written = updates
        elif operation.kind == "fusion-start":
            root = _root(self.computations.get(name, {}))
            written = array_bytes(root.result) if root else 0.0
        total = written
        for number, operand in enumerate(operation.operands):
            whole = _operand_bytes(computation, operand)
            read = self._sliced_bytes(name, number) if whole else None
            total += whole if read is None else min(whole, read)
        return total

    def _sliced_bytes(self, name: str, number: int) -> float | None:
        """Bytes of the slices of a fusion's parameter; None if anything else reads it."""
        body = self.computations.get(name, {})
        same = {
            each.name
            for each in body.values()
            if each.kind == "parameter" and each.argument == str(number)
        }
        total = 0.0
        for each in body.values():
            if not same & {*each.operands}:
                continue
            first = each.operands[0] in same
            if each.kind in _VIEWS:
                same.add(each.name)
            elif each.kind in _SLICES and first:
                total += array_bytes(each.result)
            elif each.kind == "fusion":
                inner = each.attribute("calls") or ""
                for place, operand in enumerate(each.operands):
                    read = self._sliced_bytes(inner, place) if operand in same else 0.0
                    if read is None:
                        return None
                    total += read
            elif not (each.kind == "dynamic-update-slice" and first):
                return None
        return total if same else None

    def _updated_bytes(self, name: str) -> float | None:
        """Bytes that a fusion writes if its result is an update in place; else None."""
        body = self.computations.get(name, {})
        root = _origin(body, _root(body))
        if root is None:
            return None
        names = root.operands if root.kind == "tuple" else (root.name,)
        parts = [part for each in names if (part := _origin(body, body.get(each))) is not None]
        updates = [self._update_of(body, part) for part in parts]
        if len(parts) < len(names) or all(each is None for each in updates):
            return None
        return sum(
            array_bytes(part.result, on_chip=False) if update is None else update
            for part, update in zip(parts, updates, strict=True)
        )

    def _update_of(self, body: Mapping[str, Operation], operation: Operation) -> float | None:
        if operation.kind == "fusion":
            return self._updated_bytes(operation.attribute("calls") or "")
        if operation.kind != "dynamic-update-slice":
            return None
        update = body.get(operation.operands[1])
        return array_bytes(update.result) if update else None


def _read(root: str | None, name: str, text: str) -> Operation:
    """Read `(f32[2]{0}, s32[]) fusion(%a, %b), calls=%c`."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    result, _, call = text[: end + 1], None, text[end + 1 :].lstrip()
    kind, _, _ = call.partition("(")
    opening = len(kind)
    closing = _closing(call, opening) if opening < len(call) else opening
    argument = call[opening + 1 : closing]
    operands = tuple(_NAMES.findall(argument))
    return Operation(name, bool(root), result, kind, operands, argument, call[closing + 1 :])


def _closing(text: str, start: int) -> int:
    """Find the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text) - 1


def _root(body: Mapping[str, Operation]) -> Operation | None:
    return next((each for each in body.values() if each.is_root), None)


def _origin(body: Mapping[str, Operation], operation: Operation | None) -> Operation | None:
    while operation is not None and operation.kind == "bitcast":
        operation = body.get(operation.operands[0]) if operation.operands else None
    return operation


def _operand_bytes(computation: Mapping[str, Operation], name: str) -> float:
    operand = computation.get(name)
    return array_bytes(operand.result, on_chip=False) if operand else 0.0
