"""The training step: the gradient of the trainable parameters, and their update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_lora.adapter import combine
from jax_lora.dropout import dropout
from jax_lora.transform import lora_apply
from jax_lora.transform.low_memory_jit import low_memory_jit

LossFn = Callable[[Any, Any], tuple[jax.Array, jax.Array]]  # (variables, batch) -> sums
Join = Callable[[Any, Any], Any]  # (frozen, trainable) -> variables


class TrainState(NamedTuple):
    """The state of a training run.

    Attributes:
      trainable: The adapter or, in full fine-tuning, the model's variables.
      opt_state: The optimizer state.
      step: int32 scalar, the number of updates made.
    """

    trainable: Any
    opt_state: Any
    step: jax.Array


class StepReport(NamedTuple):
    """Scalars of one step, float32.

    Attributes:
      loss: Mean loss per unit of weight, such as a target token, before the update.
      weight: The batch's weight: the number of target tokens or of examples.
      gradient_norm: Norm of the gradient, before clipping.
    """

    loss: jax.Array
    weight: jax.Array
    gradient_norm: jax.Array


def init_state(
    trainable: Any, optimizer: optax.GradientTransformation, *, in_place: bool = False
) -> TrainState:
    """Create the state before the first step.

    Args:
      trainable: A fresh adapter, or the model's variables. They are copied, because the step
        donates its state.
      optimizer: The optimizer.
      in_place: Do not copy `trainable`; the first step then deletes it.

    Returns:
      The state.
    """
    own: Any = trainable if in_place else jax.tree.map(jnp.array, trainable)
    return TrainState(own, optimizer.init(own), jnp.int32(0))


def dropout_transform(rate: float, seed: int) -> Callable[[Any, jax.Array], Any] | None:
    """Return a `transform` for `make_step`: dropout with a new key per step; None at rate 0."""
    if rate == 0.0:
        return None
    key = jax.random.key(seed)
    return lambda variables, step: dropout(variables, jax.random.fold_in(key, step))


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    transform: Callable[[Any, jax.Array], Any] | None = None,
    join: Join = combine,
    platform: str | None = None,
    state_shardings: Any = None,
) -> Any:
    """Create a jitted training step for any model, loss, and batch.

    Use it in your own training loop; `Trainer` is the training loop of the library. The base model
    is an argument of the step and not a constant, so compiled functions are small, and base models
    of the same shape share them.

    Args:
      loss_fn: `loss_fn(variables, batch) -> (sum of losses, weight)`, two float32 scalars, written
        for plain variables. `variables` may be any tree, `batch` any pytree of arrays.
      optimizer: Optimizer of the trainable parameters.
      accumulation: Number of micro-batches that a batch is split into along the first axis of its
        arrays. The sum of their gradients is the gradient of the whole batch.
      transform: `transform(variables, step)`, applied to the combined variables: for example
        dropout.
      join: Combines frozen and trainable parameters: `jl.combine` for an adapter.
      platform: Target platform, as in `lora_apply`, to compile for another one than the default.
      state_shardings: The shardings of the new state, as a `TrainState`. With those of the first
        state, the second step is not compiled again. None: the compiler chooses them.

    Returns:
      `step(state, frozen, batch) -> (TrainState, StepReport)`, jitted; it donates `state`. Create
      the first state with `init_state`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jax_lora as jl
      >>> def loss_fn(variables, batch):
      ...     error = batch["x"] @ variables["kernel"] - batch["y"]  # (examples, out)
      ...     return jnp.sum(error**2), jnp.float32(error.shape[0])
      >>> variables = {"kernel": jnp.zeros((4, 2))}
      >>> adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=2))
      >>> optimizer = optax.sgd(0.01)
      >>> step = make_step(loss_fn, optimizer)
      >>> batch = {"x": jnp.ones((3, 4)), "y": jnp.ones((3, 2))}
      >>> state = init_state(adapter, optimizer)
      >>> for _ in range(100):
      ...     state, report = step(state, variables, batch)
      >>> bool(report.loss < 0.1), int(state.step)
      (True, 100)
    """
    loss = lora_apply(loss_fn, platform=platform)

    def loss_of_part(trainable: Any, frozen: Any, part: Any, step: jax.Array) -> Any:
        variables = join(frozen, trainable)
        total, weight = loss(variables if transform is None else transform(variables, step), part)
        return jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32)

    gradient = jax.value_and_grad(loss_of_part, has_aux=True)

    def sums_of_batch(trainable: Any, frozen: Any, batch: Any, step: jax.Array) -> Any:
        if accumulation == 1:
            return gradient(trainable, frozen, batch, step)
        # Neighboring rows are on one device. All devices share each part, because it has rows from
        # the whole batch.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(sums: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(trainable, frozen, part, step)), None

        zeros = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, trainable)
        return jax.lax.scan(add, zeros, parts)[0]

    def update(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, StepReport]:
        (total, weight), sums = sums_of_batch(state.trainable, frozen, batch, state.step)
        # A batch without targets has loss 0, not 0 / 0.
        count = jnp.where(weight == 0, jnp.ones_like(weight), weight)
        gradients = jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), sums)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        report = StepReport(total / count, weight, optax.tree.norm(gradients))
        return TrainState(trainable, opt_state, state.step + 1), report

    results = None if state_shardings is None else (state_shardings, None)
    return low_memory_jit(update, platform=platform, donate_argnums=0, out_shardings=results)
