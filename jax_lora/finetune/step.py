"""One training step: the gradient of what is trained alone, and its update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_lora.adapter import combine
from jax_lora.data.batches import Batch
from jax_lora.finetune.loss import summed_loss
from jax_lora.transform import lora_apply


class TrainState(NamedTuple):
    """All that changes in training.

    Attributes:
      trained: The adapter or, where the model is trained in full, its variables.
      moments: The optimizer's state, as large as what is trained, or a few times that.
      step: int32 scalar, the number of updates made.
    """

    trained: Any
    moments: Any
    step: jax.Array


class StepReport(NamedTuple):
    """What a step says about itself: float32 scalars.

    Attributes:
      loss: Mean over the learned tokens, before the update.
      tokens: Number of learned tokens.
      gradient_norm: Norm of the gradient, before clipping.
    """

    loss: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array


def start(
    trained: Any, optimizer: optax.GradientTransformation, *, in_place: bool = False
) -> TrainState:
    """Make the state before the first step.

    Args:
      trained: A fresh adapter, or the model's variables. They are copied, as the step takes over
        the state that it is given.
      optimizer: The optimizer.
      in_place: Do not copy: the first step deletes `trained`.

    Returns:
      The state.
    """
    own: Any = trained if in_place else jax.tree.map(jnp.array, trained)
    return TrainState(own, optimizer.init(own), jnp.int32(0))


Join = Callable[[Any, Any], Any]  # (frozen, trained) -> what the model is applied to


def make_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    wrap: Callable[[Any, jax.Array], Any] | None = None,
    join: Join = combine,
    chunk: int | None = None,
) -> Any:
    """Make the jitted update; it takes over the state's memory.

    The base is an argument and not a constant of the program, so programs stay small and several
    bases of one shape can use the same one.

    Args:
      model: A decoder of `jax_lora.models`.
      optimizer: Optimizer of what is trained.
      accumulation: Parts that a batch is cut into, one after the other in memory. Sums of losses
        and token counts are added up, so the update is that of the whole batch.
      wrap: Changes the joined variables of a step, given the step's number (dropout).
      join: Puts what is frozen and what is trained together.
      chunk: As in `summed_loss`.

    Returns:
      `step(state, frozen, batch) -> (TrainState, StepReport)`, jitted, with its `lower`.
    """
    loss = lora_apply(lambda variables, part: summed_loss(model, variables, part, chunk=chunk))

    def of_part(trained: Any, frozen: Any, part: Batch, step: jax.Array) -> Any:
        joined = join(frozen, trained)
        return loss(joined if wrap is None else wrap(joined, step), part)

    gradient = jax.value_and_grad(of_part, has_aux=True)

    def whole(trained: Any, frozen: Any, batch: Batch, step: jax.Array) -> Any:
        if accumulation == 1:
            return gradient(trained, frozen, batch, step)
        # Every part takes rows from all over, as neighbouring rows lie on one device.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(sums: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(trained, frozen, part, step)), None

        nothing = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, trained)
        return jax.lax.scan(add, nothing, parts)[0]

    def update(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, StepReport]:
        (total, tokens), sums = whole(state.trained, frozen, batch, state.step)
        count = jnp.maximum(tokens, 1.0)  # a batch with nothing to learn has loss 0, not 0 / 0
        gradients = jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), sums)
        updates, moments = optimizer.update(gradients, state.moments, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        report = StepReport(total / count, tokens, optax.tree.norm(gradients))
        return TrainState(trained, moments, state.step + 1), report

    return jax.jit(update, donate_argnums=0)


def make_validation(
    model: Any, *, join: Join = combine, chunk: int | None = None
) -> Callable[[Any, Any, Batch], tuple[Any, Any]]:
    """Compile the summed loss of a batch, of what is trained or, given None, of what is frozen.

    Args:
      model: A decoder of `jax_lora.models`.
      join: Puts what is frozen and what is trained together.
      chunk: As in `summed_loss`.

    Returns:
      `measure(trained, frozen, batch) -> (sum of losses, learned tokens)`.
    """
    loss = lora_apply(lambda variables, batch: summed_loss(model, variables, batch, chunk=chunk))

    @jax.jit
    def measure(trained: Any, frozen: Any, batch: Batch) -> Any:
        return loss(frozen if trained is None else join(frozen, trained), batch)

    return measure
