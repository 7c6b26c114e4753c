"""Create an Optax optimizer by name, with gradient clipping and LoRA+."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax
import optax.contrib

from jax_lora.errors import ConfigError
from jax_lora.optimizers import lora_plus

# These need more than gradients and a schedule: the loss, a key, or a constant learning rate.
NEED_MORE = (
    "galore",
    "lbfgs",
    "momo",
    "momo_adam",
    "noisy_sgd",
    "optimistic_adam",  # deprecated in favor of optimistic_adam_v2
    "rprop",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sm3",
    "sophia",
)
_NAMES = vars(optax.contrib) | vars(optax)  # getattr would warn about deprecated names


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str = "adamw",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    lora_plus_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """Create the optimizer of a run for its trainable parameters, as `TrainSettings` describes it.

    Weight decay must be 0 for an optimizer without weight decay.
    """
    check_optimizer(name)
    optimizer = _decayed(_NAMES[name], schedule, weight_decay)
    if max_grad_norm > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)
    return optimizer if lora_plus_ratio == 1.0 else lora_plus(optimizer, lora_plus_ratio)


def check_optimizer(name: Any) -> None:
    """Refuse the name of an unknown optimizer.

    Raises:
      ConfigError: Optax has no optimizer with that name; the message lists similar names.
    """
    if not isinstance(name, str) or name not in optimizer_names():
        near = difflib.get_close_matches(str(name), optimizer_names(), n=3, cutoff=0.5)
        raise ConfigError(
            "optimizer",
            got=repr(name),
            expected=f"an optimizer of Optax: {', '.join(optimizer_names())}",
            fix=f"Did you mean {' or '.join(near)}?" if near else "Use adamw, the default.",
        )


@functools.cache
def optimizer_names() -> tuple[str, ...]:
    """List the optimizers of Optax and `optax.contrib` that require only a learning rate."""
    names = {*_NAMES} - {*NEED_MORE}
    return tuple(sorted(name for name in names if _is_optimizer(_NAMES[name])))


def _is_optimizer(value: Any) -> bool:
    if not inspect.isfunction(value) or value.__name__.startswith(("_", "scale_by")):
        return False
    parameters = inspect.signature(value).parameters
    needed = {each.name for each in parameters.values() if each.default is inspect.Parameter.empty}
    return next(iter(parameters), None) == "learning_rate" and needed <= {"learning_rate"}


def _decayed(
    factory: Callable[..., Any], schedule: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    """Pass the weight decay to the optimizer if it has such an argument."""
    parameters = inspect.signature(factory).parameters
    if "weight_decay" in parameters:
        return factory(schedule, weight_decay=weight_decay)
    if "weight_decay_rate" in parameters:
        return factory(schedule, weight_decay_rate=weight_decay or None)
    if weight_decay == 0.0:
        return factory(schedule)
    raise ConfigError(
        "weight_decay",
        got=f"{weight_decay:g} for {factory.__name__}, which has no weight decay",
        expected="0",
        fix="Use an optimizer with weight decay, such as adamw or lion.",
    )
