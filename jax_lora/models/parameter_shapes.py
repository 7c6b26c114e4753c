"""The parameters that a module has, from shapes alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

__all__ = ["parameter_shapes"]


def parameter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, in the order of the paths; allocates nothing."""
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    flat: dict[str, Any] = flatten_dict(shapes["params"], sep="/")
    return {path: flat[path].shape for path in sorted(flat)}
