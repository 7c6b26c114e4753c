"""Making a counterexample short: take away whatever the failure does not need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from tests.properties.programs import Block, KernelSpec, Line, Program, Var


def shrink(program: Program, fails: Callable[[Program], bool], most: int = 300) -> Program:
    """Find a smaller program that fails as well.

    Args:
      program: A program that fails.
      fails: Whether a program fails in the same way; False for one that makes no sense.
      most: How many programs to try.

    Returns:
      The smallest program found.
    """
    tried = 0
    shorter = True
    while shorter:
        shorter = False
        for candidate in _smaller(program):
            tried += 1
            if tried > most:
                return program
            if fails(candidate):
                program, shorter = candidate, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    if program.outer != "plain":
        yield dataclasses.replace(program, outer="plain")
    if program.precision != "float64":
        yield dataclasses.replace(program, precision="float64")
    for name, spec in program.kernels.items():
        if f'"{name}"' not in program.body.mentions():
            kept = {key: value for key, value in program.kernels.items() if key != name}
            yield dataclasses.replace(program, kernels=kept)
        elif spec.rank:
            for simpler in (dict(rank=1), dict(scale=1.0)):
                smaller = dataclasses.replace(spec, **simpler)
                if smaller != spec:
                    yield dataclasses.replace(program, kernels={**program.kernels, name: smaller})
            yield dataclasses.replace(
                program, kernels={**program.kernels, name: KernelSpec(spec.shape)}
            )
    for body in _smaller_block(program.body, _Reach()):
        yield dataclasses.replace(program, body=body.without_dead_lines())


class _Reach(dict):
    """Names in reach, by the shape of their value."""

    def plus(self, variables: tuple[Var, ...]) -> _Reach:
        more = _Reach({shape: list(names) for shape, names in self.items()})
        for var in variables:
            more.setdefault(var.shape, []).append(var.name)
        return more


def _smaller_block(block: Block, reach: _Reach) -> Iterator[Block]:
    if block.name == "program" and len(block.results) > 1:
        for result in block.results:
            yield dataclasses.replace(block, results=(result,))
    if block.name == "program":
        for line in block.lines:  # stop early
            yield dataclasses.replace(block, results=(line.targets[0].name,))
    reach = reach.plus(block.parameters)
    for place, line in enumerate(block.lines):
        for simpler in _smaller_line(line, reach):
            lines = (*block.lines[:place], *simpler, *block.lines[place + 1 :])
            yield dataclasses.replace(block, lines=lines)
        reach = reach.plus(line.targets)


def _smaller_line(line: Line, reach: _Reach) -> Iterator[tuple[Line, ...]]:
    if len(line.targets) == 1:
        (var,) = line.targets
        names = [name for name in reach.get(var.shape, ()) if name != line.expression]
        already = line.expression in reach.get(var.shape, ()) or line.expression.startswith(
            ("jnp.ones(", 'p["')
        )
        if not already:
            for name in names[:2] + names[2:][-2:]:
                yield (Line((var,), name),)
            yield (Line((var,), f"jnp.ones({var.shape}, HIGH)"),)
        for head in ("jnp.tanh(", "0.5 * (", "jax.nn.silu("):
            if line.expression.startswith(head):
                yield (Line((var,), line.expression[len(head) : -1], line.blocks),)
    for place, inner in enumerate(line.blocks):
        for smaller in _smaller_block(inner, reach):
            blocks = (*line.blocks[:place], smaller, *line.blocks[place + 1 :])
            yield (dataclasses.replace(line, blocks=blocks),)
