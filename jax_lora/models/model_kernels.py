"""Find the kernels of the models of this package, which take token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.kernels.kernel import Kernels
from jax_lora.transform import find_kernels

TOKENS = 8  # sequence length for tracing


def model_kernels(apply: Callable[..., Any], variables: Any) -> Kernels:
    """Find the kernels that a model applies to one short sequence.

    Args:
      apply: `model.apply`, or a function of parameters and ids (1, tokens).
      variables: Its first argument: arrays, or `jax.ShapeDtypeStruct`s.

    Returns:
      The result of `find_kernels`.
    """
    return find_kernels(apply, variables, jax.ShapeDtypeStruct((1, TOKENS), jnp.int32))
