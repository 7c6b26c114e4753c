"""Parse the HLO text of a compiled function into operations."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a compiled function.

    Args:
      name: HLO name, as in profiles.
      kind: "dot", "fusion", "copy", ...
      shape: Shape of the result, or of the largest result.
      operands: Shapes of the operands.
      scope: Name scope of the JAX operation.
      contracted: Number of contracted elements, for a dot.
      called: Names of the computations that it calls, such as a fused one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    operands: tuple[tuple[int, ...], ...]
    scope: str
    contracted: int
    called: tuple[str, ...]

    @property
    def dot_flops(self) -> float:
        """FLOPs of the operation if it is a dot, or 0."""
        return 2.0 * math.prod(self.shape) * self.contracted if self.kind == "dot" else 0.0


Computations = Mapping[str, list[Operation]]


def read(text: str) -> Computations:
    """Parse the HLO text of a compiled function.

    Args:
      text: `compiled.as_text()`.

    Returns:
      Operations by the name of their computation.
    """
    computations: dict[str, list[Operation]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    current = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[1]
            computations[current] = []
        elif current and (match := _OPERATION.match(line)):
            operation = _operation(match, shapes)
            shapes[operation.name] = operation.shape
            computations[current].append(operation)
    return computations


def _operation(match: re.Match[str], shapes: Mapping[str, tuple[int, ...]]) -> Operation:
    name, result, kind, rest = match.groups()
    results = [_dims(dims) for dims in _ARRAY.findall(result)]
    operands = tuple(
        shapes[each] for each in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]) if each in shapes
    )
    contracted = 1
    if kind == "dot" and (axes := re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)):
        contracted = math.prod(operands[0][axis] for axis in _dims(axes[1]))
    scope = _NAME.search(rest)
    return Operation(
        name, kind, max(results, key=math.prod, default=()), operands,
        scope[1] if scope else "", contracted, tuple(_CALLED.findall(rest)),
    )  # fmt: skip


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(",") if each)


def parts(computations: Computations, operation: Operation) -> list[Operation]:
    """Return an operation and, recursively, the operations that it calls."""
    inner = [part for name in operation.called for part in computations.get(name, [])]
    return [operation, *(each for part in inner for each in parts(computations, part))]
