"""Learning rates over a run: a warm-up, then cosine, linear or no decay."""

from __future__ import annotations

import optax

from jax_lora.errors import ConfigError, format_error

SHAPES = ("cosine", "linear", "constant")


def make_schedule(
    shape: str, peak: float, iterations: int, *, warmup: float = 0.03, end: float = 0.0
) -> optax.Schedule:
    """Make the learning rate as a function of the step.

    Args:
      shape: `"cosine"`, `"linear"` or `"constant"`, after the warm-up.
      peak: Learning rate at the end of the warm-up.
      iterations: Steps of the whole run.
      warmup: Share of them in which the rate rises from 0.
      end: Learning rate at the last step, unless constant.

    Returns:
      An Optax schedule.

    Raises:
      ConfigError: Another shape.

    Example:
      >>> rate = make_schedule("linear", 1.0, 100, warmup=0.1)
      >>> [round(float(rate(step)), 2) for step in (0, 10, 55, 100)]
      [0.0, 1.0, 0.5, 0.0]
    """
    rising = min(round(warmup * iterations), iterations - 1)
    rest = max(1, iterations - rising)
    decays = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=end / peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }
    if shape not in decays:
        raise ConfigError(
            format_error(
                "lr_schedule",
                got=repr(shape),
                expected=f"one of {', '.join(SHAPES)}",
                fix='Leave it out for "cosine".',
            )
        )
    if rising == 0:
        return decays[shape]()
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, rising), decays[shape]()], [rising]
    )
