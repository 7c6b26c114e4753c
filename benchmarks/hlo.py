"""Read XLA's own text of a compiled program: its operations, and what part of a model each is."""

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
    """One operation of a program, with what a fusion calls.

    Args:
      name: XLA's name for it, as profiles show it.
      kind: "dot", "fusion", "copy", ...
      shape: Of its result, or of the largest one.
      operands: Shapes of its operands.
      scope: Where in the Python program it comes from.
      contracted: Length of the sum, for a dot.
      called: Names of the computations that it calls.
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
        """Flops of the operation itself if it is a dot."""
        return 2.0 * math.prod(self.shape) * self.contracted if self.kind == "dot" else 0.0


Program = Mapping[str, list[Operation]]


def read(text: str) -> Program:
    """Read a program.

    Args:
      text: `compiled.as_text()`.

    Returns:
      Operations by the name of their computation.
    """
    program: dict[str, list[Operation]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    current = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[1]
            program[current] = []
        elif current and (match := _OPERATION.match(line)):
            operation = _operation(match, shapes)
            shapes[operation.name] = operation.shape
            program[current].append(operation)
    return program


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


def parts(program: Program, operation: Operation) -> list[Operation]:
    """Return an operation with everything that it calls, however deep."""
    inner = [part for name in operation.called for part in program.get(name, [])]
    return [operation, *(each for part in inner for each in parts(program, part))]
