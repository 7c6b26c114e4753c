"""Measure training steps: deterministic figures, and interleaved times."""

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
from jax_lora.plan.matmul_flops import matmul_flops


def make_step(form: Form, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Return `step(trainable, state, frozen, tokens) -> (trainable, state, loss)`."""

    def step(trainable: Any, state: Any, frozen: Any, tokens: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(form.loss)(trainable, frozen, tokens)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    return step


def jit_step(form: Form, tx: optax.GradientTransformation) -> Any:
    """Return the jitted step, which donates trainable parameters and optimizer state."""
    return jax.jit(make_step(form, tx), donate_argnums=(0, 1))


# -----------------------------------------------------------------------------------------------
# Deterministic figures
# -----------------------------------------------------------------------------------------------

# By default, XLA for CPU schedules operations for concurrency, and starts recomputation before it
# is needed. This selects the scheduler that minimizes memory.
LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@dataclasses.dataclass(frozen=True)
class Figures:
    """The cost of a step, from its jaxpr and its compiled function.

    Args:
      dot_flops: FLOPs of the matmuls of the jaxpr, without dead code, with loop trip counts.
      xla_flops: FLOPs that XLA reports; the body of a scan counts once.
      bytes_accessed: Bytes that XLA reports; the body of a scan counts once.
      temp_bytes: Memory other than arguments and results.
      argument_bytes: Parameters, factors, optimizer state and tokens.
      residual_bytes: Residuals of the backward pass, without arguments.
      trace_seconds: Time from Python to jaxpr.
      lower_seconds: Time from jaxpr to StableHLO.
      compile_seconds: Time from StableHLO to the compiled function.
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
    """The stages of compiling a step.

    Args:
      traced: The result of `jax.jit(...).trace`.
      compiled: The compiled function.
      seconds: Times to trace, lower and compile.
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
    """Trace, lower and compile a step from shapes, with empty caches.

    Args:
      form: The row.
      tx: The optimizer.
      tokens: Token ids or their shape.
      clock: `time.process_time` for CPU time, which varies less on a busy machine.
      compiler_options: Options for XLA, such as `LEAST_MEMORY`.

    Returns:
      The stages and their times.
    """
    trainable, frozen, tokens = jax.tree.map(_shape, (form.trainable, form.frozen, tokens))
    arguments = (trainable, jax.eval_shape(tx.init, trainable), frozen, tokens)
    jax.clear_caches()  # so that every row includes all tracing
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
    """Trace, lower and compile a step from shapes, and measure it.

    Args:
      form: The row.
      tx: The optimizer.
      tokens: Token ids or their shape.
      compiler_options: Options for XLA, such as `LEAST_MEMORY`.

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
    """Count the FLOPs of the matmuls of a jaxpr.

    Dead code is removed first. The body of a scan counts once per iteration, and a `cond` counts
    its most expensive branch. The body of a `while` counts once, as its iterations are unknown.

    Args:
      closed: A closed jaxpr.

    Returns:
      FLOPs; a multiply-add counts as two.

    Example:
      >>> import jax.numpy as jnp
      >>> def f(x):  # (2, 3)
      ...     unused = x @ jnp.ones((3, 100))
      ...     return jax.lax.scan(lambda x, _: (x @ jnp.ones((3, 3)), None), x, length=5)[0]
      >>> dot_flops(jax.make_jaxpr(f)(jnp.ones((2, 3))))  # 5 * 2 * (2 * 3 * 3)
      180.0
    """
    jaxpr = closed.jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return matmul_flops(live)


def residual_bytes(loss: Callable[..., Any], trainable: Any, frozen: Any, tokens: Any) -> int:
    """Count the bytes of the residuals of reverse-mode differentiation.

    Arguments are excluded, as they are in memory anyway. Views of the same array count once.

    Args:
      loss: `loss(trainable, frozen, tokens)`.
      trainable: Shapes of the trainable parameters.
      frozen: Shapes of the frozen parameters.
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


# Their results share memory with their operand, or are fused into the matmul that reads them.
_VIEWS = ("reshape", "transpose", "squeeze", "expand_dims", "copy", "stop_gradient", "name")


# -----------------------------------------------------------------------------------------------
# Times
# -----------------------------------------------------------------------------------------------


class Run:
    """A compiled step with its state, to run interleaved with others."""

    def __init__(self, compiled: Any, form: Form, tx: optax.GradientTransformation, tokens: Any):
        """Copy the arguments that the step donates, and run a warmup step."""
        self._step, self._frozen, self._tokens = compiled, form.frozen, tokens
        self._trainable = jax.tree.map(lambda leaf: leaf.copy(), form.trainable)
        self._state = tx.init(self._trainable)
        self.step()

    def step(self) -> float:
        """Run one step and return its time in seconds."""
        start = time.perf_counter()
        self._trainable, self._state, loss = self._step(
            self._trainable, self._state, self._frozen, self._tokens
        )
        jax.block_until_ready((self._trainable, self._state, loss))
        return time.perf_counter() - start


def interleave(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Time several functions interleaved (A B C A B C), so that noise affects them equally.

    Args:
      runs: Functions by name that run once and return their time in seconds.
      rounds: Number of runs of each.

    Returns:
      Times in seconds by name, in order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def ratio(seconds: list[float], reference: list[float]) -> float:
    """Return the median of the ratios within each round.

    Example:
      >>> ratio([1.0, 2.0, 9.0], [2.0, 4.0, 4.0])  # the third round is an outlier
      0.5
    """
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
