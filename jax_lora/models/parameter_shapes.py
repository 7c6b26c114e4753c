"""The parameters that a module has, from shapes alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jax_lora.errors import LoraError, ModelError


def parameter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, in the order of the paths; allocates nothing.

    Raises:
      ModelError: The settings contradict each other, such as rotary settings that divide by zero.
    """
    ids = jnp.zeros((1, 1), jnp.int32)
    try:
        shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    except LoraError:
        raise
    except (ArithmeticError, TypeError, ValueError) as error:
        got = f"settings that do not go together ({type(error).__name__}: {str(error)[:200]})"
        expected, fix = "the settings of a model that was trained", "download config.json again."
        raise ModelError(
            type(model.config).__name__, got=got, expected=expected, fix=fix
        ) from error
    flat: dict[str, Any] = flatten_dict(shapes["params"], sep="/")
    return {path: flat[path].shape for path in sorted(flat)}
