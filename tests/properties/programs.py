"""Random programs as data: lines of JAX that print as the source they are run from.

A counterexample is worth as much as it is short, so a program keeps its lines apart: shrink.py
takes lines away, and what is left is printed and pasted into a named test as it stands.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jax_lora as jl
from jax_lora.adapter import Adapter
from jax_lora.updates import LoraPair

Shape = tuple[int, ...]
Scale = float | tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """A kernel of the program, and the pair that adapts it; without a rank it is not adapted."""

    shape: Shape
    in_axes: Shape = ()
    out_axes: Shape = ()
    stack_axes: Shape = ()
    rank: int = 0
    scale: Scale = 1.0
    whole: bool = False

    def sides(self) -> tuple[Shape, Shape, Shape]:
        """The axes by what they are to the pair."""
        return self.in_axes, self.out_axes, self.stack_axes


@dataclasses.dataclass(frozen=True)
class Var:
    """A variable and the shape of its value."""

    name: str
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Line:
    """`targets = expression`, after the functions that the expression names."""

    targets: tuple[Var, ...]
    expression: str
    blocks: tuple[Block, ...] = ()

    def reads(self) -> set[str]:
        """Names that the line needs from before it, and perhaps a few more."""
        return names_in(self.expression).union(*(block.reads() for block in self.blocks))

    def source(self) -> list[str]:
        """The line as it is written."""
        defined = [row for block in self.blocks for row in block.source()]
        return [*defined, f"{', '.join(var.name for var in self.targets)} = {self.expression}"]


@dataclasses.dataclass(frozen=True)
class Block:
    """A function: the whole program, or the body of a scan, a branch, a vmap in it."""

    name: str
    parameters: tuple[Var, ...]
    lines: tuple[Line, ...]
    results: tuple[str, ...]
    single: bool = False  # return the one result itself, not a tuple of it

    def reads(self) -> set[str]:
        """Names that the function needs from around it, and perhaps a few more."""
        read = names_in(*self.results).union(*(line.reads() for line in self.lines))
        return read - {var.name for var in self.parameters}

    def mentions(self) -> str:
        """All of its text, to look for the leaves that it reads."""
        return "\n".join(self.source())

    def source(self) -> list[str]:
        """The function as it is written."""
        rows = [row for line in self.lines for row in line.source()]
        result = self.results[0] if self.single else f"({', '.join(self.results)},)"
        head = f"def {self.name}({', '.join(var.name for var in self.parameters)}):"
        return [head, *(f"    {row}" for row in (*rows, f"return {result}"))]

    def without_dead_lines(self) -> Block:
        """The same function without lines that nothing reads."""
        needed, kept = names_in(*self.results), []
        for line in reversed(self.lines):
            if any(var.name in needed for var in line.targets):
                blocks = tuple(block.without_dead_lines() for block in line.blocks)
                kept.append(dataclasses.replace(line, blocks=blocks))
                needed |= kept[-1].reads()
        return dataclasses.replace(self, lines=tuple(reversed(kept)))


def names_in(*expressions: str) -> set[str]:
    """Every identifier in some expressions."""
    return {name for text in expressions for name in re.findall(r"[A-Za-z_]\w*", text)}


# How the data, the kernels and the factors of a program are stored, and what it casts down to.
PRECISIONS: dict[str, dict[str, Any]] = {
    "float64": dict(high=jnp.float64, low=jnp.float64, kernel=jnp.float64, factor=jnp.float64),
    "float32": dict(high=jnp.float32, low=jnp.float32, kernel=jnp.float32, factor=jnp.float32),
    "casts": dict(high=jnp.float32, low=jnp.bfloat16, kernel=jnp.float32, factor=jnp.float32),
    "small kernels": dict(
        high=jnp.float32, low=jnp.bfloat16, kernel=jnp.bfloat16, factor=jnp.float32
    ),
    "bfloat16": dict(high=jnp.bfloat16, low=jnp.bfloat16, kernel=jnp.bfloat16, factor=jnp.float32),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of kernels and inputs, and all that it takes to run it.

    `outer` says how the function is mapped from outside: `"plain"`, `"data"`, `"adapters"` and
    `"both"` (vmap), or `"remat"`. With `found`, the axes of each kernel are what `find_kernels`
    makes of the function, instead of any.
    """

    name: str
    kernels: Mapping[str, KernelSpec]
    inputs: Mapping[str, Shape]
    body: Block
    precision: str = "float64"
    outer: str = "plain"
    form: str = "auto"
    found: bool = False
    forward: bool = True
    reverse: bool = True
    magnitudes: bool = False  # whether the pairs are DoRA's

    def source(self) -> str:
        """The program as it is written."""
        return "\n".join(self.body.source()) + "\n"

    def function(self, precision: str | None = None) -> Callable[..., Any]:
        """The program as a function of the tree of kernels and its inputs."""
        types = PRECISIONS[precision or self.precision]
        scope = dict(VOCABULARY, HIGH=types["high"], LOW=types["low"])
        exec(compile(self.source(), f"<{self.name}>", "exec"), scope)
        return scope[self.body.name]

    def with_axes_found(self) -> Program:
        """The same program with the axes that `find_kernels` reports for its kernels."""
        types, shaped = PRECISIONS[self.precision], jax.ShapeDtypeStruct
        tree = {name: shaped(spec.shape, types["kernel"]) for name, spec in self.kernels.items()}
        inputs = [shaped(shape, types["high"]) for shape in self.inputs.values()]
        found = jl.find_kernels(self.function(), tree, *inputs)
        specs = {
            name: dataclasses.replace(
                spec,
                in_axes=found[name].in_axes,
                out_axes=found[name].out_axes,
                stack_axes=found[name].stack_axes,
                scale=2.0 if isinstance(spec.scale, tuple) else spec.scale,
            )
            if spec.rank and name in found
            else spec
            for name, spec in self.kernels.items()
        }
        return dataclasses.replace(self, kernels=specs, found=False)

    def arrays(self, precision: str | None = None) -> tuple[Any, Adapter, dict[str, Any]]:
        """The tree of kernels, the adapter, and the inputs; the same numbers in any precision."""
        stored, wanted = PRECISIONS[self.precision], PRECISIONS[precision or self.precision]
        copies = {"adapters": (2,), "both": (2,)}.get(self.outer, ())

        def array(name: str, shape: Shape, kind: str) -> Any:
            drawn = numbers(f"{self.name} {name}", shape).astype(stored[kind])
            return drawn.astype(wanted[kind])

        tree = {name: array(name, spec.shape, "kernel") for name, spec in self.kernels.items()}
        pairs, whole = {}, {}
        for name, spec in self.kernels.items():
            size = lambda axes, spec=spec: tuple(spec.shape[axis] for axis in axes)  # noqa: E731
            stack = (*copies, *size(spec.stack_axes))
            if spec.rank:
                pairs[name] = LoraPair(
                    a=array(f"{name} a", (*stack, *size(spec.in_axes), spec.rank), "factor"),
                    b=array(f"{name} b", (*stack, spec.rank, *size(spec.out_axes)), "factor"),
                    in_axes=spec.in_axes,
                    out_axes=spec.out_axes,
                    stack_axes=spec.stack_axes,
                    scale=spec.scale,
                    magnitude=array(f"{name} m", (*stack, *size(spec.out_axes)), "factor")
                    if self.magnitudes
                    else None,
                )
            elif spec.whole:
                whole[name] = array(f"{name} whole", (*copies, *spec.shape), "kernel")
        copies = {"data": (2,), "both": (2,)}.get(self.outer, ())
        inputs = {
            name: array(name, (*copies, *shape), "high") for name, shape in self.inputs.items()
        }
        return tree, Adapter(pairs, whole, jl.LoraConfig()), inputs


def numbers(name: str, shape: Shape, size: float = 0.7) -> np.ndarray:
    """Gaussian numbers that depend on a name alone."""
    return size * np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)


# -----------------------------------------------------------------------------------------------
# What programs are written with
# -----------------------------------------------------------------------------------------------


def fit(array: Any, shape: Shape) -> Any:
    """Give an array any shape: its numbers in order, again from the start where they run out."""
    if array.shape == tuple(shape):
        return array
    flat, size = array.reshape(-1), math.prod(shape)
    if (times := -(-size // flat.size)) > 1:
        flat = jnp.broadcast_to(flat[None], (times, flat.size)).reshape(-1)
    return lax.slice(flat, (0,), (size,)).reshape(shape)


def choice(array: Any, count: int) -> Any:
    """A position below `count` that depends on data, but not on how data are rounded."""
    return jnp.sum(array.ravel()[: count - 1] > 0)


@jax.custom_jvp
def product_with_own_jvp(x: Any, w: Any) -> Any:
    """A product with its derivative written by hand."""
    return jnp.sin(jnp.tensordot(x, w, 1))


@product_with_own_jvp.defjvp
def _product_jvp(primals: Any, tangents: Any) -> Any:
    (x, w), (dx, dw) = primals, tangents
    slope = jnp.cos(jnp.tensordot(x, w, 1))
    return product_with_own_jvp(x, w), slope * (jnp.tensordot(dx, w, 1) + jnp.tensordot(x, dw, 1))


@jax.custom_vjp
def product_with_own_vjp(x: Any, w: Any) -> Any:
    """A product whose gradient is halved on purpose: the rule must be the one that is used."""
    return jnp.tensordot(x, w, 1)


def _product_vjp(kept: Any, g: Any) -> Any:
    return jax.tree.map(
        lambda leaf: 0.5 * leaf, jax.vjp(lambda x, w: jnp.tensordot(x, w, 1), *kept)[1](g)
    )


product_with_own_vjp.defvjp(lambda x, w: (product_with_own_vjp(x, w), (x, w)), _product_vjp)


@jax.custom_jvp
def sine_with_own_jvp(x: Any) -> Any:
    """An activation with its derivative written by hand."""
    return jnp.sin(x)


sine_with_own_jvp.defjvps(lambda dx, _, x: dx * jnp.cos(x))

VOCABULARY: dict[str, Any] = {
    "jax": jax,
    "jnp": jnp,
    "lax": lax,
    "checkpoint_name": checkpoint_name,
    "fit": fit,
    "choice": choice,
    "product_with_own_jvp": product_with_own_jvp,
    "product_with_own_vjp": product_with_own_vjp,
    "sine_with_own_jvp": sine_with_own_jvp,
    "policies": jax.checkpoint_policies,
}


def all_lines(block: Block) -> Iterator[Line]:
    """Every line of a function and of the functions in it."""
    for line in block.lines:
        yield line
        for inner in line.blocks:
            yield from all_lines(inner)
