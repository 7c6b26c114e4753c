"""The rows of the tables, and a check that they all compute the same.

All rows start from the same base weights and LoRA factors, so they have the same loss and
gradients. `check` verifies this before anything is timed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import products
from benchmarks.decoder import SIZES
from benchmarks.forms import (
    Builder,
    Case,
    Factors,
    Form,
    Weights,
    full,
    full_flat,
    hand_written,
    make_weights,
    ours,
)


def _with_qwix(case: Case, weights: Weights) -> Form:
    """The plain model with qwix."""
    from benchmarks.peers import qwix_form  # an optional dependency

    return qwix_form(case, weights)


def _with_nnx(case: Case, weights: Weights) -> Form:
    """The decoder in NNX, with `nnx.LoRALinear`."""
    from benchmarks.peers import nnx_form

    return nnx_form(case, weights)


FACTORED = "hand-written LoRA"

ROWS: Mapping[str, Builder] = {
    "full fine-tuning": full,
    "full, tokens flattened": full_flat,
    "materialized": functools.partial(hand_written, products.materialized),
    FACTORED: functools.partial(hand_written, products.factored),
    "hand-written, scale on x@A": functools.partial(hand_written, products.scale_inside),
    "hand-written, tokens flattened": functools.partial(hand_written, products.flattened),
    "jax_lora (auto)": functools.partial(ours, "auto"),
    "jax_lora (factored)": functools.partial(ours, "factored"),
    "jax_lora (merged)": functools.partial(ours, "merged"),
    "qwix": _with_qwix,
    "nnx.LoRALinear": _with_nnx,
}


# -----------------------------------------------------------------------------------------------
# Check
# -----------------------------------------------------------------------------------------------


def check(case: Case, rows: Sequence[str], tolerance: float = 1e-4) -> None:
    """Compare the loss and the factor gradients of rows with those of full fine-tuning.

    A case below float32 precision, or too large to compute twice, is checked at a tiny size.

    Args:
      case: The model, batch and settings.
      rows: Names of rows.
      tolerance: Largest difference, relative to the largest element of each gradient.

    Raises:
      RuntimeError: A row has a different loss or gradient.
    """
    if case.dtype != jnp.float32 or case.size.width > 1024:
        case = dataclasses.replace(case, size=SIZES["tiny"], dtype=jnp.float32)
    weights = make_weights(case)
    want_loss, want = _loss_and_gradients(full(case, weights), weights)
    for row in rows:
        loss, got = _loss_and_gradients(ROWS[row](case, weights), weights)
        if abs(loss - want_loss) > 1e-5 * abs(want_loss):
            raise RuntimeError(f"{row}: loss {loss}, expected {want_loss} as in full fine-tuning")
        for path in want:
            for name, g, w in zip("ab", got[path], want[path], strict=True):
                error = np.abs(g - w).max() / np.abs(w).max()
                if not error < tolerance:
                    raise RuntimeError(f"{row}: gradient {name} of {path} is off by {error:.1e}")


def _loss_and_gradients(form: Form, weights: Weights) -> tuple[float, dict[str, Any]]:
    @jax.jit
    def both(trainable: Any, frozen: Any, tokens: Any) -> tuple[jax.Array, Factors]:
        loss, gradient = jax.value_and_grad(form.loss)(trainable, frozen, tokens)
        return loss, form.gradients(gradient)

    loss, gradients = both(form.trainable, form.frozen, weights.tokens)
    return float(loss), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradients)
