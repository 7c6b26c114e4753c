"""Drawing a program: what is in reach at one place of it, and the choice of the next step.

The steps themselves are in weight_steps.py, meeting_steps.py, data_steps.py and block_steps.py.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from tests.properties.programs import Block, KernelSpec, Line, Program, Shape, Var

LARGEST = 240  # entries of any one value: what is drawn must be quick to run
SIZES = (1, 2, 2, 2, 3, 3, 3, 4, 5)


class Scope:
    """The variables in reach at one place of a program, and the lines written there so far."""

    def __init__(self, data: Sequence[Var], weights: Sequence[Var], depth: int = 0):
        self.data, self.weights, self.depth = list(data), list(weights), depth
        self.lines: list[Line] = []
        self.made: list[Var] = []  # data that a line here makes
        self.prepared: list[Var] = []  # weights that a line here makes of others
        self.touched: set[str] = {var.name for var in weights}  # what some weight has a part in

    def write(self, line: Line) -> None:
        """Write a line."""
        self.lines.append(line)
        if line.reads() & self.touched:
            self.touched |= {var.name for var in line.targets}


@dataclasses.dataclass
class Draw:
    """A source of choices, and what has been decided about the whole program."""

    rng: random.Random
    inputs: list[Var]
    kernels: dict[str, KernelSpec] = dataclasses.field(default_factory=dict)
    lowered: bool = False
    forward: bool = True
    reverse: bool = True
    named: int = 0

    def name(self, stem: str) -> str:
        """A name that nothing has yet."""
        self.named += 1
        return f"{stem}{self.named}"

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self.rng.random() < probability

    def size(self) -> int:
        """Length of an axis."""
        return self.rng.choice(SIZES)

    def shape(self, most: int = 3) -> Shape:
        """A shape of at least one axis."""
        return tuple(self.size() for _ in range(self.rng.randint(1, most)))

    def shuffled(self, items: Any) -> list[Any]:
        """The items in any order."""
        return self.rng.sample(list(items), len(items))

    def data(self, scope: Scope) -> Var:
        """A data variable: one made just now more likely than an old one."""
        if scope.made and self.chance(0.7):
            touched = [var for var in scope.made if var.name in scope.touched]
            return self.rng.choice((touched or scope.made)[-3:])
        return self.rng.choice(scope.data)

    def weight(self, scope: Scope, least: int = 1, most: int = 6) -> Var | None:
        """A weight with so many axes, if there is one: one made of another more likely than not."""
        fitting = [var for var in scope.weights if least <= len(var.shape) <= most]
        prepared = [var for var in fitting if var in scope.prepared[-2:]]
        if prepared and self.chance(0.6):
            return prepared[-1]
        return self.rng.choice(fitting) if fitting else None

    def sides(self, var: Var) -> tuple[Shape, Shape, Shape]:
        """Input, output and stack axes of a leaf; none for a weight made of one."""
        spec = self.kernels.get(var.name)
        return spec.sides() if spec else ((), (), ())

    def weight_like(self, scope: Scope, stacks: Shape, outs: int) -> Var | None:
        """An adapted leaf itself, with so many output axes and these stack axes."""
        fitting = [
            var
            for var in scope.weights
            if self.sides(var)[2] == stacks and len(self.sides(var)[1]) == outs
        ]
        return self.rng.choice(fitting) if fitting else None

    def start(self, size: int) -> str:
        """An expression for the start of a slice, which may lie outside of the axis."""
        return f"{self.position(size)} - {self.rng.choice((0, 0, 1, size + 1))}"

    def position(self, count: int) -> str:
        """An expression for a position that is known only when the program runs."""
        return f"choice({self.rng.choice(self.inputs).name}, {count})"

    # -------------------------------------------------------------------------------------------

    def make(
        self, scope: Scope, expression: str, shape: Shape, blocks: tuple[Block, ...] = ()
    ) -> Var:
        """Write a line that makes data."""
        var = Var(self.name("v"), tuple(shape))
        scope.write(Line((var,), expression, blocks))
        self.keep(scope, var)
        return var

    def keep(self, scope: Scope, var: Var) -> None:
        """Put data that a line has made in reach of the lines after it."""
        scope.data.append(var)
        scope.made.append(var)

    def make_weight(self, scope: Scope, expression: str, shape: Shape, **blocks: Any) -> Var:
        """Write a line that makes a weight of a weight."""
        var = Var(self.name("w"), tuple(shape))
        scope.write(Line((var,), expression, blocks.get("blocks", ())))
        scope.weights.append(var)
        scope.prepared.append(var)
        return var

    def prepare(self, scope: Scope) -> None:
        """Make a weight of a weight, and of that another, so that rules act one upon the other."""
        if self.chance(0.4):
            self.steps(scope, self.rng.randint(1, 3), ("weight",))

    def steps(
        self, scope: Scope, count: int, kinds: Sequence[str] = ("weight", "meet", "data", "block")
    ) -> None:
        """Write some steps; a program inside a program inside a program is deep enough."""
        allowed = [
            each
            for each in STEPS
            if each.kind in kinds and (each.kind != "block" or scope.depth < 2)
        ]
        written = tried = 0
        while written < count and tried < 10 * count:
            tried += 1
            (step,) = self.rng.choices(allowed, weights=[each.often for each in allowed])
            written += bool(step.write(self, scope))

    def ends(self, scope: Scope) -> list[Var]:
        """What the lines of this place lead to: if possible, data that a weight has a part in."""
        read = {name for line in scope.lines for name in line.reads()}
        made = [var for var in scope.made if var.name not in read]
        return [var for var in made if var.name in scope.touched] or made or [self.data(scope)]

    def block(
        self, scope: Scope, data: Sequence[Var], weights: Sequence[Var], **options: Any
    ) -> Block:
        """Write a function of data and weights, which sees the variables around it as well.

        Options: `want` (shapes of its results), `single`, `order` (of the parameters), `wrap` (of
        each result), `before` (results that are expressions already).
        """
        inner = Scope([*scope.data, *data], [*scope.weights, *weights], scope.depth + 1)
        # What comes in through the parameters is what the function is there for.
        inner.touched |= scope.touched
        inner.data += list(data) * 3
        inner.weights += list(weights) * 4
        self.steps(inner, self.rng.randint(1, 2))
        for _ in range(3):  # a function that no weight enters is not what is tested here
            if any(var.name in inner.touched for var in inner.made):
                break
            self.steps(inner, 1, ("meet",))
        results = list(options.get("before", ()))
        for shape in options.get("want", ()):
            wrap = options.get("wrap", "{}")
            end = self.rng.choice(self.ends(inner))
            results.append(wrap.format(f"fit({end.name}, {shape})"))
        order = options.get("order") or (*data, *weights)
        return Block(
            self.name("body"), tuple(order), tuple(inner.lines), tuple(results),
            options.get("single", False),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """A way to go on with a program."""

    kind: str
    often: float
    write: Callable[[Draw, Scope], Any]


STEPS: list[Step] = []


def step(kind: str, often: float) -> Callable[[Any], Any]:
    """Register a function that writes lines, or returns nothing where it does not apply."""

    def register(write: Callable[[Draw, Scope], Any]) -> Any:
        STEPS.append(Step(kind, often, write))
        return write

    return register


def small(shape: Sequence[int], most: int = LARGEST) -> bool:
    """Tell whether a value of this shape is quick to compute with."""
    return math.prod(shape) <= most and len(shape) <= 6


# -----------------------------------------------------------------------------------------------
# Whole programs
# -----------------------------------------------------------------------------------------------


def draw_program(seed: int, index: int, forms: Sequence[str] = ("auto",)) -> Program:
    """Draw the program of this number: always the same one.

    Args:
      seed: Seed of a run.
      index: Number of the program in the run.
      forms: Forms of a product to draw from.

    Returns:
      A program with its kernels, adapters and inputs.
    """
    rng = random.Random(f"{seed}/{index}")
    inputs = [
        Var(f"x{i}", tuple(rng.choice(SIZES) for _ in range(rng.randint(1, 3))))
        for i in range(rng.randint(1, 2))
    ]  # noqa: E501
    precision = rng.choices(
        ("float64", "float32", "casts", "small kernels", "bfloat16"), weights=(80, 4, 6, 4, 6)
    )[0]
    draw = Draw(rng, inputs, lowered=precision != "float64")
    kernels = draw.kernels = _kernels(draw)
    scope = Scope(inputs, [])
    for name, spec in kernels.items():
        cast = ".astype(HIGH)" if precision == "small kernels" else ""
        var = Var(name, spec.shape)
        scope.lines.append(Line((var,), f'p["{name}"]{cast}'))
        (scope.weights if spec.rank else scope.data).append(var)
        scope.touched |= {name} if spec.rank or spec.whole else set()
    while not any(var.name in scope.touched for var in scope.made):
        draw.steps(scope, rng.randint(2, 5) if precision == "float64" else rng.randint(1, 2))
    results = [var.name for var in draw.ends(scope)[-4:]]
    if scope.weights and rng.random() < 0.05:
        results.append(rng.choice(scope.weights).name)
    body = Block("program", (Var("p", ()), *inputs), tuple(scope.lines), tuple(results))
    return Program(
        name=f"{seed}/{index}",
        kernels=kernels,
        inputs={var.name: var.shape for var in inputs},
        body=body.without_dead_lines(),
        precision=precision,
        outer=rng.choices(("plain", "data", "adapters", "both", "remat"), weights=(70, 8, 8, 8, 6))[
            0
        ],
        form=rng.choice(list(forms)),
        found=rng.random() < 0.3,
        forward=draw.forward,
        reverse=draw.reverse,
    )


def _kernels(draw: Draw) -> dict[str, KernelSpec]:
    specs: dict[str, KernelSpec] = {}
    if draw.chance(0.5):  # a family that one input may meet: query, key and value
        head, stack = draw.shape(2), (draw.size(),) if draw.chance(0.3) else ()
        for _ in range(draw.rng.randint(2, 3)):
            shape = (*stack, *head, *draw.shape(2))
            roles = "s" * len(stack) + "i" * len(head) + "o" * (len(shape) - len(head) - len(stack))
            specs[f"W{len(specs)}"] = _kernel(draw, shape, roles)
    for _ in range(draw.rng.randint(0 if specs else 1, 2)):
        shape = tuple(draw.size() for _ in range(draw.rng.choice((2, 2, 2, 3, 3, 4, 5))))
        specs[f"W{len(specs)}"] = _kernel(draw, shape, _roles(draw, len(shape)))
    if draw.chance(0.12):  # a convolution sums over all axes but one
        roles = "".join(draw.shuffled("o" + "i" * draw.rng.randint(2, 3)))
        specs[f"W{len(specs)}"] = _kernel(draw, tuple(draw.size() for _ in roles), roles)
    if draw.chance(0.08):  # experts
        specs[f"W{len(specs)}"] = _kernel(draw, tuple(draw.size() for _ in "sio"), "sio")
    if draw.chance(0.15):
        specs["plain"] = KernelSpec(draw.shape(3))
    if draw.chance(0.15):
        specs["trained_whole"] = KernelSpec(draw.shape(3), whole=True)
    return specs


def _roles(draw: Draw, count: int) -> str:
    """Say of every axis whether it is an input, an output or a stack: at least one in, one out."""
    rest = draw.rng.choices("ios", weights=(2, 2, 1), k=count - 2)
    return "".join(draw.shuffled(["i", "o", *rest]))


def _kernel(draw: Draw, shape: Shape, roles: str) -> KernelSpec:
    # The order of a factor's axes is its own: now and then it is not the kernel's.
    order = draw.shuffled if draw.chance(0.2) else list
    axes = {role: tuple(order([i for i, r in enumerate(roles) if r == role])) for role in "ios"}
    stack = tuple(shape[axis] for axis in axes["s"])
    scale = draw.rng.choice((0.5, 1.0, 2.0, -1.5))
    return KernelSpec(
        shape, axes["i"], axes["o"], axes["s"], draw.rng.choice((1, 1, 2, 2, 3, 17)),
        _scales(draw, stack) if stack and draw.chance(0.3) else scale,
    )  # fmt: skip


def _scales(draw: Draw, stack: Shape) -> Any:
    if not stack:
        return draw.rng.choice((0.25, 1.0, 2.0, -1.0))
    return tuple(_scales(draw, stack[1:]) for _ in range(stack[0]))
