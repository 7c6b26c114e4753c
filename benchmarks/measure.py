"""Figures of a training step: those that repeat exactly, and interleaved times."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.extend import core as jex_core
from jax.interpreters import partial_eval

from benchmarks.forms import Form


def make_step(form: Form, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Write one training step: `step(trainable, state, frozen, tokens)` -> the first two, loss."""

    def step(trainable: Any, state: Any, frozen: Any, tokens: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(form.loss)(trainable, frozen, tokens)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    return step


def jit_step(form: Form, tx: optax.GradientTransformation) -> Any:
    """Compile-ready step that donates what it trains and the optimizer's state."""
    return jax.jit(make_step(form, tx), donate_argnums=(0, 1))


# -----------------------------------------------------------------------------------------------
# Figures that repeat
# -----------------------------------------------------------------------------------------------

# XLA for CPU orders operations so that many can run beside each other, and runs ahead of need what
# rematerialization wants late. This tells it to keep the least memory instead.
LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a step costs, as read from its programs.

    Args:
      dot_flops: Of all matrix products of the jaxpr, without dead code, bodies times trip count.
      xla_flops: Of XLA's program, all operations; a scan's body counts once.
      bytes_accessed: Read and written by XLA's program; a scan's body counts once.
      temp_bytes: Memory beside arguments and results.
      argument_bytes: Parameters, factors, optimizer state and tokens.
      residual_bytes: Kept from the forward pass for the backward pass, arguments left out.
      trace_seconds: From Python to jaxpr.
      lower_seconds: From jaxpr to StableHLO.
      compile_seconds: From StableHLO to a program.
    """

    dot_flops: float
    xla_flops: float
    bytes_accessed: float
    temp_bytes: int
    argument_bytes: int
    residual_bytes: int
    trace_seconds: float
    lower_seconds: float
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Stages:
    """A step on its way to a program.

    Args:
      traced: What `jax.jit(...).trace` returned.
      compiled: The program.
      seconds: Of tracing, lowering and compiling.
    """

    traced: Any
    compiled: Any
    seconds: tuple[float, float, float]


def stages(
    form: Form,
    tx: optax.GradientTransformation,
    tokens: Any,
    clock: Callable[[], float] = time.perf_counter,
    compiler_options: Mapping[str, Any] | None = None,
) -> Stages:
    """Trace, lower and compile a step from shapes alone, with all caches empty.

    Args:
      form: The row.
      tx: The optimizer.
      tokens: Token ids or their shape.
      clock: `time.process_time` counts this process alone, which a busy machine disturbs less.
      compiler_options: For XLA, such as `LEAST_MEMORY`.

    Returns:
      The stages and their seconds.
    """
    trainable, frozen, tokens = jax.tree.map(_shape, (form.trainable, form.frozen, tokens))
    arguments = (trainable, jax.eval_shape(tx.init, trainable), frozen, tokens)
    jax.clear_caches()  # each row pays for its own traces
    start = clock()
    traced = jit_step(form, tx).trace(*arguments)
    traced_at = clock()
    lowered = traced.lower()
    lowered_at = clock()
    compiled = lowered.compile(compiler_options=dict(compiler_options or {}))
    compiled_at = clock()
    seconds = (traced_at - start, lowered_at - traced_at, compiled_at - lowered_at)
    return Stages(traced, compiled, seconds)


def figures(
    form: Form,
    tx: optax.GradientTransformation,
    tokens: Any,
    compiler_options: Mapping[str, Any] | None = None,
) -> tuple[Figures, Any]:
    """Trace, lower and compile one step from shapes alone.

    Args:
      form: The row.
      tx: The optimizer.
      tokens: Token ids or their shape.
      compiler_options: For XLA, such as `LEAST_MEMORY`.

    Returns:
      The figures, and the compiled step.
    """
    trainable, frozen, tokens = jax.tree.map(_shape, (form.trainable, form.frozen, tokens))
    made = stages(form, tx, tokens, compiler_options=compiler_options)
    trace_seconds, lower_seconds, compile_seconds = made.seconds
    compiled = made.compiled
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    result = Figures(
        dot_flops=dot_flops(made.traced.jaxpr),
        xla_flops=cost["flops"],
        bytes_accessed=cost["bytes accessed"],
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        residual_bytes=residual_bytes(form.loss, trainable, frozen, tokens),
        trace_seconds=trace_seconds,
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
    )
    return result, compiled


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def dot_flops(closed: Any) -> float:
    """Count the flops of a program's matrix products.

    Code whose result nobody reads is removed first. The body of a scan counts once for each trip;
    of a `cond`, the branch that costs most. The trips of a `while` are not known: it counts once.

    Args:
      closed: A closed jaxpr.

    Returns:
      Two for each multiplication and addition.

    Example:
      >>> import jax.numpy as jnp
      >>> def f(x):  # (2, 3), times five
      ...     unused = x @ jnp.ones((3, 100))
      ...     return jax.lax.scan(lambda x, _: (x @ jnp.ones((3, 3)), None), x, length=5)[0]
      >>> dot_flops(jax.make_jaxpr(f)(jnp.ones((2, 3))))  # 5 * 2 * (2 * 3 * 3)
      180.0
    """
    jaxpr = closed.jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return float(_flops(live))


def _flops(jaxpr: Any) -> float:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(eqn: Any) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lengths = [eqn.invars[0].aval.shape[axis] for axis in contracted]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lengths)
    inner = [_flops(jaxpr) for value in eqn.params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * eqn.params.get("length", 1) if name == "scan" else sum(inner)


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [jaxpr for each in value for jaxpr in _jaxprs(each)]
    if isinstance(value, jex_core.ClosedJaxpr):
        return [value.jaxpr]
    return [value] if isinstance(value, jex_core.Jaxpr) else []


def residual_bytes(loss: Callable[..., Any], trainable: Any, frozen: Any, tokens: Any) -> int:
    """Count the bytes that reverse mode keeps between the two passes.

    Arguments are left out: they are in memory anyway. What is kept twice, or once more in another
    shape, counts once.

    Args:
      loss: `loss(trainable, frozen, tokens)`.
      trainable: Shapes of what is differentiated.
      frozen: Shapes of what is not.
      tokens: Shape of the token ids.

    Returns:
      Bytes.
    """

    def forward(trainable: Any, frozen: Any, tokens: Any) -> list[Any]:
        _, backward = jax.vjp(lambda each: loss(each, frozen, tokens), trainable)
        return jax.tree.leaves(backward)

    jaxpr = jax.make_jaxpr(forward)(trainable, frozen, tokens).jaxpr
    makers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def origin(var: Any) -> Any:
        while (maker := makers.get(var)) is not None and maker.primitive.name in _VIEWS:
            var = maker.invars[0]
        return var

    arrays = [var for var in jaxpr.outvars if not isinstance(var, jex_core.Literal)]
    kept = {origin(var) for var in arrays} - set(jaxpr.invars)
    return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in kept)


# What these give is the same memory to XLA, or is part of the product that reads it.
_VIEWS = ("reshape", "transpose", "squeeze", "expand_dims", "copy", "stop_gradient", "name")


# -----------------------------------------------------------------------------------------------
# Times
# -----------------------------------------------------------------------------------------------


class Run:
    """A compiled step with its own state, to be stepped in turn with others."""

    def __init__(self, compiled: Any, form: Form, tx: optax.GradientTransformation, tokens: Any):
        """Take copies of what the step donates, and warm up."""
        self._step, self._frozen, self._tokens = compiled, form.frozen, tokens
        self._trainable = jax.tree.map(lambda leaf: leaf.copy(), form.trainable)
        self._state = tx.init(self._trainable)
        self.step()

    def step(self) -> float:
        """Run one step to its end; return its seconds."""
        start = time.perf_counter()
        self._trainable, self._state, loss = self._step(
            self._trainable, self._state, self._frozen, self._tokens
        )
        jax.block_until_ready((self._trainable, self._state, loss))
        return time.perf_counter() - start


def interleave(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Time several programs in turn, A B C A B C, so that all see the same noise.

    Args:
      runs: By name, what runs once and returns its seconds.
      rounds: How many times each is run.

    Returns:
      Seconds by name, in the order of the rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def ratio(seconds: list[float], reference: list[float]) -> float:
    """Median over the rounds of the ratio within a round.

    Example:
      >>> ratio([1.0, 2.0, 9.0], [2.0, 4.0, 4.0])  # the third round was disturbed
      0.5
    """
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
