"""Strategies: how products are computed on a target. The result does not depend on them.

    factored   x · W0 + scale * (x · a) · b        nothing of W0's size is computed
    merged     x · (W0 + scale * a · b)            forward and dx; da and db stay factored

The factored form is the rule. The merged form and flattened tokens pay on a CPU in float32, and
only there. A `Strategy` decides from shapes, types and the target platform, which is settled once,
at the outermost call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jax_lora.errors import ConfigError, format_error

FACTORED, MERGED = "factored", "merged"
MATERIALIZED = "materialized"  # not a choice: what is left where an operation has no rule
FORMS = ("auto", FACTORED, MERGED)
PLATFORMS = ("cpu", "gpu", "tpu")
_ALIASES = {"cuda": "gpu", "rocm": "gpu"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the cost of a contraction depends on.

    Args:
      tokens: Number of rows of x.
      inputs: Length of the sum.
      outputs: Results per token.
      rank: Rank of the factors.
      x_dtype: Type of x.
      w_dtype: Type of W0 in the contraction.
      precision: As in `lax.dot_general`.
      dropout: Whether the factors see other data than W0 does.
      stored: Whether W0 is stored as an array of its own, and not made by a recipe.
    """

    tokens: Any
    inputs: int
    outputs: int
    rank: int
    x_dtype: Any
    w_dtype: Any
    precision: Any
    dropout: bool
    stored: bool

    @property
    def break_even(self) -> float:
        """Number of tokens from which the merged form is no slower than the factored one.

        Forward, 2·T·r·(in + out) flops of the low-rank products compare with 2·r·in·out for
        W0 + scale * a · b: equal at in·out / (in + out) tokens. The flops of a training step are
        equal at twice as many, but a step then touches 40% fewer bytes;
        `benchmarks/break_even.py` measures equal times at about the forward pass's number.
        """
        return self.inputs * self.outputs / (self.inputs + self.outputs)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A form, and the reason for it in words."""

    form: str
    why: str


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Decides how the products of one call of `lora_apply` are computed.

    Args:
      platform: The target: "cpu", "gpu" or "tpu".
      form: "auto", or the form that the caller has pinned.
    """

    platform: str
    form: str = "auto"

    def choose(self, sizes: Sizes) -> Choice:
        """Choose the form of one contraction.

        A pinned "merged" gives way only where it would change the result.
        """
        if self.form == FACTORED:
            return Choice(FACTORED, "pinned")
        if sizes.dropout:
            return Choice(FACTORED, "dropout: the factors see other data than W0")
        if not sizes.stored:
            return Choice(FACTORED, "W0 is made where it is used")
        rounded = self._rounds(sizes)
        if rounded is not None:
            return Choice(FACTORED, f"{rounded}, which would round the update away")
        if self.form == MERGED:
            return Choice(MERGED, "pinned")
        if not isinstance(sizes.tokens, int):
            return Choice(FACTORED, f"the number of tokens is symbolic: {sizes.tokens}")
        tokens, least = f"{sizes.tokens:,} tokens", f"{sizes.break_even:,.0f}"
        if sizes.tokens < sizes.break_even:
            return Choice(FACTORED, f"{tokens}, under {least}: merging costs more")
        return Choice(MERGED, f"{tokens}, at least {least}: merging costs less")

    def flattens(self, *arrays: Any) -> bool:
        """Tell whether to merge adjacent axes, such as batch and sequence, before a product.

        XLA for CPU runs a contraction over (batch, sequence) far slower than one over tokens. Other
        platforms gain nothing, and merging two axes that are both sharded costs a gather.
        """
        return self.platform == "cpu" and not any(map(_is_sharded, arrays))

    def _rounds(self, sizes: Sizes) -> str | None:
        """Say what would compute W0 + scale * a · b in fewer bits than float32 has, or None."""
        for name, dtype in (("W0", sizes.w_dtype), ("x", sizes.x_dtype)):
            if jnp.finfo(dtype).bits < 32:
                return f"{name} is {jnp.dtype(dtype).name}"
        single = jnp.finfo(sizes.w_dtype).bits == 32
        if self.platform != "cpu" and single and not _is_exact(sizes.precision):
            return f"{self.platform} multiplies float32 in fewer bits at this precision"
        return None


def _is_sharded(array: Any) -> bool:
    sharding = getattr(jax.typeof(array), "sharding", None)
    return any(axis is not None for axis in getattr(sharding, "spec", ()))


def _is_exact(precision: Any) -> bool:
    if precision is None:
        precision = getattr(jax.config, "jax_default_matmul_precision", None)
        return precision in ("highest", "float32")
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(each == lax.Precision.HIGHEST for each in both)


# -----------------------------------------------------------------------------------------------
# The target
# -----------------------------------------------------------------------------------------------


def check_form(form: str) -> str:
    """Refuse an unknown `form`.

    Raises:
      ConfigError: It is not one of `FORMS`.
    """
    return _one_of("form", form, FORMS, 'Leave it out for "auto", which decides by shape.')


def check_platform(platform: str | None) -> str | None:
    """Refuse an unknown `platform`, and give those of one kind one name.

    Raises:
      ConfigError: It is not one of `PLATFORMS`.
    """
    if platform is None:
        return None
    fix = "Leave it out for the platform of the inputs."
    return _one_of("platform", _ALIASES.get(platform, platform), PLATFORMS, fix)


def _one_of(name: str, value: str, known: Sequence[str], fix: str) -> str:
    if value in known:
        return value
    expected = f"one of {', '.join(known)}"
    raise ConfigError(
        format_error(f"lora_apply: {name}", got=repr(value), expected=expected, fix=fix)
    )


def target_platform(arrays: Sequence[Any]) -> str:
    """Return the platform of arrays that lie on a device, else the default backend's.

    Args:
      arrays: Inputs of a call; tracers lie nowhere.

    Returns:
      "cpu", "gpu" or "tpu", or the name of another backend.
    """
    lying = (array for array in arrays if isinstance(array, jax.Array))
    devices = (each.sharding.device_set for each in lying if not isinstance(each, Tracer))
    device = next((next(iter(each)) for each in devices), None)
    platform: str = jax.default_backend() if device is None else device.platform
    return _ALIASES.get(platform, platform)
