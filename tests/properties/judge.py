"""Holding `lora_apply(f)` to `f(merged weights)`: values, forward and reverse derivatives."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jax_lora as jl
from jax_lora.transform.apply import with_settings
from jax_lora.transform.evaluate import Evaluate
from jax_lora.transform.sites import Settings, Site
from tests.lora_cases import merged_tree
from tests.properties.programs import Program, numbers

# Quick to compile matters more than quick to run: every program is compiled once and run once.
_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of one program.

    Args:
      failure: What is wrong, or None.
      kind: The failure without its numbers, so that two can be told to be the same.
      sites: Every contraction of a weight, and every weight that was formed, with its form.
      rules: How often the rule of each primitive applied to a weight, over all traces.
      moved: Whether the adapter has any bearing on the result.
      skipped: Whether JAX itself refuses the program, on merged weights as well.
      miscompiled: Whether it is right operation by operation, and wrong only as XLA joins them.
    """

    failure: str | None
    kind: str | None = None
    sites: tuple[Site, ...] = ()
    rules: Mapping[str, int] = dataclasses.field(default_factory=dict)
    moved: bool = True
    skipped: bool = False
    miscompiled: bool = False


def judge(program: Program) -> Verdict:
    """Run a program on low-rank weights and on merged ones, and compare all that comes out.

    Args:
      program: The program.

    Returns:
      The verdict; an exception on the low-rank side alone is a failure like another. What is wrong
      once compiled is run again uncompiled: XLA is not on trial, and a fault of ours would stay.
    """
    settings = Settings("allow", program.form)
    with jax.enable_x64(True):
        try:
            if program.found:
                program = program.with_axes_found()
            want = _everything(program, _merged_side)
        except NotImplementedError:
            return Verdict(None, skipped=True)
        try:
            with _counted_rules() as rules:
                got = _everything(program, functools.partial(_lora_side, settings=settings))
        except Exception as error:
            return Verdict(f"{type(error).__name__}: {error}", type(error).__name__)
        truth = (
            want
            if program.precision == "float64"
            else _everything(program, _merged_side, "float64")
        )
        failure = _compare(program, got, want, truth)
        if failure:
            nudged = [_everything(program, _merged_side, nudge=number) for number in (1, 2, 3, 4)]
            failure = _compare(program, got, want, truth, nudged)
        miscompiled = failure is not None and _holds_uncompiled(program)
        failure = None if miscompiled else failure
    kind = failure and failure.split(":")[0]
    moved = any(np.any(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(want["moved"]))
    sites = tuple(settings.sites)
    return Verdict(failure, kind, sites, rules, moved, miscompiled=miscompiled)


def _holds_uncompiled(program: Program) -> bool:
    lora_side = functools.partial(_lora_side, settings=Settings("allow", program.form))
    got = _everything(program, lora_side, compiled=False)
    want = _everything(program, _merged_side, compiled=False)
    truth = _everything(program, _merged_side, "float64", compiled=False)
    return _compare(program, got, want, truth) is None


@contextlib.contextmanager
def _counted_rules() -> Iterator[collections.Counter[str]]:
    """Count, by primitive, how often a rule kept a weight's structure or used it."""
    applied: collections.Counter[str] = collections.Counter()
    originals = {name: getattr(Evaluate, name) for name in ("move", "consume", "enter")}

    def counted(original: Any) -> Any:
        @functools.wraps(original)
        def count(self: Any, eqns: Any, *args: Any) -> Any:
            outputs = original(self, eqns, *args)
            for eqn in eqns if isinstance(eqns, list) else [eqns]:
                applied[eqn.primitive.name] += outputs is not None
            return outputs

        return count

    for name, original in originals.items():
        setattr(Evaluate, name, counted(original))
    try:
        yield applied
    finally:
        for name, original in originals.items():
            setattr(Evaluate, name, original)


# -----------------------------------------------------------------------------------------------
# Running
# -----------------------------------------------------------------------------------------------


def _lora_side(
    program: Program, precision: str | None, tree: Any, *, settings: Settings
) -> Callable[..., Any]:
    # What `lora_apply` and `explain` both do: run, and write down what is done at every site.
    with_lora = with_settings(program.function(precision), settings)
    return lambda adapter, *inputs: with_lora(jl.combine(tree, adapter), *inputs)


def _merged_side(program: Program, precision: str | None, tree: Any) -> Callable[..., Any]:
    function = program.function(precision)
    return lambda adapter, *inputs: function(merged_tree(tree, adapter), *inputs)


def _everything(
    program: Program,
    side: Any,
    precision: str | None = None,
    *,
    nudge: int = 0,
    compiled: bool = True,
) -> dict[str, Any]:
    """Value, tangent and gradients of one side, compiled or operation by operation."""
    tree, adapter, inputs = program.arrays(precision)
    if nudge:
        tree, adapter, inputs = _nudged(program, (tree, adapter, inputs), nudge)
    primals = (adapter, *inputs.values())
    along = lambda what, leaves: jax.tree.map(  # noqa: E731 - the same direction on both sides
        lambda leaf: numbers(f"{program.name} {what} {leaf.shape}", leaf.shape).astype(leaf.dtype),
        leaves,
    )

    def run(tree: Any, primals: Any, tangents: Any) -> dict[str, Any]:
        function = _mapped(program.outer, side(program, precision, tree), len(inputs))
        if not program.reverse:
            value, tangent = jax.jvp(function, primals, tangents)
            return {"value": value, "forward": tangent, "moved": tangent}
        value, pull = jax.vjp(function, *primals)
        gradient = pull(along("cotangent", value))
        result = {"value": value, "reverse": gradient, "moved": gradient[0]}
        if program.forward:
            result["forward"] = jax.jvp(function, primals, tangents)[1]
        return result

    call = functools.partial(_compiled, run) if compiled else run
    return jax.device_get(call(tree, primals, along("tangent", primals)))


def _nudged(program: Program, arrays: Any, number: int) -> Any:
    """Move every number to its neighbour in the program's type, above or below."""

    def move(path: Any, leaf: Any) -> Any:
        name = f"{program.name} nudge {number} {jax.tree_util.keystr(path)}"
        signs = np.sign(numbers(name, leaf.shape))
        moved = np.asarray(leaf, np.float64) * (1 + 2 * _unit(program) * signs)
        return moved.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(move, arrays)


def _mapped(outer: str, function: Callable[..., Any], inputs: int) -> Callable[..., Any]:
    if outer == "remat":
        return jax.checkpoint(function)
    if outer == "plain":
        return function
    adapters, data = outer in ("adapters", "both"), outer in ("data", "both")
    axes = (0 if adapters else None, *[0 if data else None] * inputs)
    return jax.vmap(function, in_axes=axes)


def _compiled(run: Callable[..., Any], *args: Any) -> Any:
    lowered = jax.jit(run).lower(*args)
    while True:
        try:
            return lowered.compile(dict(_OPTIONS))(*args)
        except jax.errors.JaxRuntimeError as error:  # an option that this version has not
            unknown = [name for name in _OPTIONS if f"'{name}'" in str(error)]
            if "No such compile option" not in str(error) or not unknown:
                raise
            _OPTIONS.pop(unknown[0])


# -----------------------------------------------------------------------------------------------
# Comparing
# -----------------------------------------------------------------------------------------------


def _compare(
    program: Program, got: Any, want: Any, truth: Any, nudged: Sequence[Any] = ()
) -> str | None:
    got_leaves, got_tree = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_tree = jax.tree_util.tree_flatten_with_path(want)
    if got_tree != want_tree:
        return f"structure: {got_tree} is not {want_tree}"
    moved = [jax.tree.leaves(each) for each in nudged]
    for place, ((path, ours), (_, theirs), right) in enumerate(
        zip(got_leaves, want_leaves, jax.tree.leaves(truth), strict=True)
    ):
        where = str(getattr(path[0], "key", path[0]))
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            return f"{where} type: {ours.dtype}{ours.shape} is not {theirs.dtype}{theirs.shape}"
        error = _worst(ours, right)
        allowed = _allowed(program, theirs, right)
        # Where a program makes much of a last digit (the slope of a tanh near 1), what the merged
        # weights happen to be off by says little: on inputs next to the given ones, they say more.
        allowed += 4 * max((_worst(leaves[place], right) for leaves in moved), default=0.0)
        if not error <= allowed:
            name = jax.tree_util.keystr(path)
            return f"{where}: {name} is off by {error:.2g}, where {allowed:.2g} is allowed"
    return None


def _worst(array: Any, right: Any) -> float:
    difference = np.asarray(array, np.float64) - np.asarray(right, np.float64)
    return float(np.max(np.abs(difference), initial=0.0))


def _allowed(program: Program, theirs: Any, right: Any) -> float:
    """How far from the truth an entry may be.

    In float64, some thousand roundings. In a smaller type, a few roundings of the largest entry, or
    some multiple of what the merged weights themselves are off by: rounding is not the fault of
    the factors where it hits both. The roundings of a sum grow with the root of its length: what
    is allowed at rank 3 is a little at rank 17.
    """
    size = max(float(np.max(np.abs(np.asarray(right, np.float64)), initial=0.0)), 1.0)
    if program.precision == "float64":
        return 1e-10 * size
    longest = max(3, *(spec.rank for spec in program.kernels.values()), 3)
    return 16 * math.sqrt(longest / 3) * _unit(program) * size + 4 * _worst(theirs, right)


def _unit(program: Program) -> float:
    """The largest relative error of one rounding."""
    return {"float64": 2.0**-53, "float32": 2.0**-24}.get(program.precision, 2.0**-9)
