"""Forms: the ways to compute x · (W0 + scale * a · b), and which of them to take where.

    factored   x · W0 + scale * (x · a) · b        nothing of W0's size is formed
    merged     x · (W0 + scale * a · b)            forward and dx; da and db stay factored

Both give the same derivatives, and neither forms a gradient of W0's size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora.errors import ConfigError, explain

FACTORED, MERGED = "factored", "merged"
MATERIALIZED = "materialized"  # no choice, but what is left where an operation has no rule
FORMS = ("auto", FACTORED, MERGED)


def check_form(form: str) -> str:
    """Refuse a `form` that is none of the known ones.

    Raises:
      ConfigError: An unknown form.
    """
    if form not in FORMS:
        raise ConfigError(
            explain(
                "lora_apply: form",
                got=repr(form),
                expected=f"one of {', '.join(FORMS)}",
                fix='Leave it out for "auto", which decides by shape.',
            )
        )
    return form


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a contraction costs depends on.

    Args:
      tokens: How many rows of x meet the kernel.
      inputs: Length of the sum.
      outputs: Results per token.
      rank: Rank of the factors.
      x_dtype: Type of x.
      w_dtype: Type of W0 where it meets x.
      precision: As in `lax.dot_general`.
      dropout: Whether the factors see another x than W0 does.
    """

    tokens: int
    inputs: int
    outputs: int
    rank: int
    x_dtype: Any
    w_dtype: Any
    precision: Any
    dropout: bool

    @property
    def break_even(self) -> float:
        """Tokens from which on the merged form is no slower than the factored one.

        Forward, 2·T·r·(in + out) flops of thin products stand against 2·r·in·out for forming
        W0 + scale * a · b: even at in·out / (in + out) tokens. A training step has even flops only
        at twice as many, but by then touches 40% fewer bytes; `benchmarks/break_even.py` measures
        that its time is even at about as many tokens as the forward pass's flops.
        """
        return self.inputs * self.outputs / (self.inputs + self.outputs)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A form, and the reason for it in words."""

    form: str
    why: str


def choose(form: str, sizes: Sizes, platform: str) -> Choice:
    """Choose the form of one contraction.

    Args:
      form: "auto", or the form that the caller has pinned.
      sizes: Shapes and types of the contraction.
      platform: Where it will run: "cpu", "gpu" or "tpu".

    Returns:
      The form and why. A pinned "merged" gives way only where it would compute something else.
    """
    if form == FACTORED:
        return Choice(FACTORED, "pinned")
    if sizes.dropout:
        return Choice(FACTORED, "dropout: the factors see another x than W0")
    rounded = _rounds(sizes, platform)
    if rounded is not None:
        return Choice(FACTORED, f"{rounded}, which would round the update away")
    if form == MERGED:
        return Choice(MERGED, "pinned")
    tokens, least = f"{sizes.tokens:,} tokens", f"{sizes.break_even:,.0f}"
    if sizes.tokens < sizes.break_even:
        return Choice(FACTORED, f"{tokens}, under {least}: forming the sum costs more")
    return Choice(MERGED, f"{tokens}, at least {least}: forming the sum costs less")


def _rounds(sizes: Sizes, platform: str) -> str | None:
    """Say what would cut W0 + scale * a · b to fewer bits than float32 has, or None."""
    for name, dtype in (("W0", sizes.w_dtype), ("x", sizes.x_dtype)):
        if jnp.finfo(dtype).bits < 32:
            return f"{name} is {jnp.dtype(dtype).name}"
    if platform != "cpu" and jnp.finfo(sizes.w_dtype).bits == 32 and not _is_exact(sizes.precision):
        return f"{platform} multiplies float32 in fewer bits at this precision"
    return None


def _is_exact(precision: Any) -> bool:
    if precision is None:
        precision = getattr(jax.config, "jax_default_matmul_precision", None)
        return precision in ("highest", "float32")
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(each == lax.Precision.HIGHEST for each in both)
