"""Learning rate schedules: a linear warmup, then cosine, linear or no decay."""

from __future__ import annotations

import optax

from jax_lora.errors import ConfigError

SHAPES = ("cosine", "linear", "constant")


def make_schedule(
    shape: str, peak: float, iterations: int, *, warmup: float = 0.03
) -> optax.Schedule:
    """Create a learning rate schedule.

    Args:
      shape: `"cosine"`, `"linear"` or `"constant"`, after the warmup.
      peak: Learning rate at the end of the warmup.
      iterations: Number of steps of the run.
      warmup: Fraction of the steps in which the learning rate rises linearly from 0.

    Raises:
      ConfigError: The shape is unknown.

    Example:
      >>> rate = make_schedule("linear", 1.0, 100, warmup=0.1)
      >>> [round(float(rate(step)), 2) for step in (0, 10, 55, 100)]
      [0.0, 1.0, 0.5, 0.0]
    """
    rising = min(round(warmup * iterations), iterations - 1)
    rest = max(1, iterations - rising)
    decays = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }
    if shape not in decays:
        raise ConfigError(
            "lr_schedule",
            got=repr(shape),
            expected=f"one of {', '.join(SHAPES)}",
            fix='Use "cosine", the default.',
        )
    if rising == 0:
        return decays[shape]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rising), decays[shape]], [rising])
