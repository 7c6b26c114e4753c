"""Find the kernels of a model whose input is token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.kernels.kernel import Kernels
from jax_lora.transform import find_kernels

TOKENS = 8  # length of the traced sequence


def model_kernels(apply: Callable[..., Any], variables: Any) -> Kernels:
    """Find the kernels that a model applies to one short sequence.

    `apply` is `model.apply`, or a function of parameters and ids (1, tokens).
    """
    return find_kernels(apply, variables, jax.ShapeDtypeStruct((1, TOKENS), jnp.int32))
