"""One training step: the gradient of the adapter alone, and its update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_lora.adapter import Adapter, combine
from jax_lora.data.batches import Batch
from jax_lora.finetune.loss import summed_loss
from jax_lora.transform import lora_apply


class TrainState(NamedTuple):
    """All that changes in training.

    Attributes:
      adapter: The factors.
      moments: The optimizer's state, of the adapter's size.
      step: int32 scalar, the number of updates made.
    """

    adapter: Adapter
    moments: Any
    step: jax.Array


class StepReport(NamedTuple):
    """What a step says about itself: float32 scalars.

    Attributes:
      loss: Mean over the learned tokens, before the update.
      tokens: Number of learned tokens.
      gradient_norm: Norm of the adapter's gradient, before clipping.
    """

    loss: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array


def make_optimizer(
    schedule: optax.Schedule, *, weight_decay: float = 0.0, max_grad_norm: float = 1.0
) -> optax.GradientTransformation:
    """Make AdamW behind a clip by the adapter's own gradient norm.

    Args:
      schedule: The learning rate.
      weight_decay: Decoupled weight decay.
      max_grad_norm: Largest norm of the gradient; 0 does not clip.

    Returns:
      An Optax transformation for the adapter.
    """
    adamw = optax.adamw(schedule, weight_decay=weight_decay)
    if max_grad_norm <= 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)


def start(adapter: Adapter, optimizer: optax.GradientTransformation) -> TrainState:
    """Make the state before the first step.

    Args:
      adapter: A fresh adapter. It is copied, as the step takes over the state that it is given.
      optimizer: The optimizer.

    Returns:
      The state.
    """
    copied: Any = jax.tree.map(jnp.array, adapter)
    return TrainState(copied, optimizer.init(copied), jnp.int32(0))


def make_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    wrap: Callable[[Any, jax.Array], Any] | None = None,
) -> Any:
    """Make the jitted update; it takes over the state's memory.

    The base is an argument and not a constant of the program, so programs stay small and several
    bases of one shape can use the same one.

    Args:
      model: A decoder of `jax_lora.models`.
      optimizer: Optimizer of the adapter.
      accumulation: Parts that a batch is cut into, one after the other in memory. Sums of losses
        and token counts are added up, so the update is that of the whole batch.
      wrap: Changes the combined variables of a step, given the step's number (dropout).

    Returns:
      `step(state, variables, batch) -> (TrainState, StepReport)`, jitted, with its `lower`.
    """
    loss = lora_apply(lambda variables, part: summed_loss(model, variables, part))

    def of_part(adapter: Adapter, variables: Any, part: Batch, step: jax.Array) -> Any:
        combined = combine(variables, adapter)
        return loss(combined if wrap is None else wrap(combined, step), part)

    gradient = jax.value_and_grad(of_part, has_aux=True)

    def whole(adapter: Adapter, variables: Any, batch: Batch, step: jax.Array) -> Any:
        if accumulation == 1:
            return gradient(adapter, variables, batch, step)
        # Every part takes rows from all over, as neighbouring rows lie on one device.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(sums: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(adapter, variables, part, step)), None

        nothing = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, adapter)
        return jax.lax.scan(add, nothing, parts)[0]

    def update(state: TrainState, variables: Any, batch: Batch) -> tuple[TrainState, StepReport]:
        (total, tokens), sums = whole(state.adapter, variables, batch, state.step)
        count = jnp.maximum(tokens, 1.0)  # a batch with nothing to learn has loss 0, not 0 / 0
        gradients = jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), sums)
        before: Any = state.adapter  # Optax's types know dicts and arrays, not dataclasses
        updates, moments = optimizer.update(gradients, state.moments, before)
        adapter: Any = optax.apply_updates(before, updates)
        report = StepReport(total / count, tokens, optax.tree.norm(gradients))
        return TrainState(adapter, moments, state.step + 1), report

    return jax.jit(update, donate_argnums=0)


def make_validation(model: Any) -> Callable[[Adapter | None, Any, Batch], tuple[Any, Any]]:
    """Compile the summed loss of a batch, with an adapter or, given None, of the base.

    Args:
      model: A decoder of `jax_lora.models`.

    Returns:
      `measure(adapter, variables, batch) -> (sum of losses, learned tokens)`.
    """
    loss = lora_apply(lambda variables, batch: summed_loss(model, variables, batch))

    @jax.jit
    def measure(adapter: Adapter | None, variables: Any, batch: Batch) -> Any:
        return loss(variables if adapter is None else combine(variables, adapter), batch)

    return measure
