"""Strategies: how products are computed on a target platform. They do not change the result.

    factored   x · W0 + scale * (x · a) · b        no additional array of W0's size
    merged     x · (W0 + scale * a · b)            forward and dx; da and db stay factored

The factored form is the default. The merged form and flattened tokens are faster only in float32
on a CPU. A `Strategy` decides by shapes, types and the target platform, which is determined once,
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

FACTORED, MERGED = "factored", "merged"
MATERIALIZED = "materialized"  # not a choice: the fallback for an operation without a rule
FORMS = ("auto", FACTORED, MERGED)
PLATFORMS = ("cpu", "gpu", "tpu")
ALIASES = {"cuda": "gpu", "rocm": "gpu"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The properties of a contraction that determine its form."""

    tokens: Any  # number of vectors in x
    inputs: int  # of the kernel
    outputs: int
    x_dtype: Any
    w_dtype: Any  # of W0 in the contraction
    precision: Any  # as in `lax.dot_general`
    dropout: bool  # whether dropout applies to the data of the factors
    stored: bool  # whether W0 is an array and not a recipe

    @property
    def break_even(self) -> float:
        """Number of tokens from which the merged form is not slower than the factored form.

        In the forward pass, the low-rank products of T tokens need 2·T·r·(in + out) flops, and
        W0 + scale * a · b needs 2·r·in·out: equal at T = in·out / (in + out). In a training step
        the flops are equal at twice this number, but the merged form accesses 40% fewer bytes
        there; `benchmarks/break_even.py` measures equal times at about the number of the forward
        pass.
        """
        return self.inputs * self.outputs / (self.inputs + self.outputs)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A form, and the reason for it as text."""

    form: str
    why: str


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Decides how the products of one call of `lora_apply` are computed."""

    platform: str  # "cpu", "gpu" or "tpu"
    form: str = "auto"  # or the form that the caller selected

    def choose(self, sizes: Sizes) -> Choice:
        """Choose the form of one contraction.

        A selected "merged" is overridden only where it would change the result.
        """
        if self.form == FACTORED:
            return Choice(FACTORED, "selected by the caller")
        if sizes.dropout:
            return Choice(FACTORED, "dropout applies to the data of the factors only")
        if not sizes.stored:
            return Choice(FACTORED, "W0 is not stored as an array")
        rounded = self._rounds(sizes)
        if rounded is not None:
            return Choice(FACTORED, f"{rounded}, so a merged weight would lose the update")
        if self.form == MERGED:
            return Choice(MERGED, "selected by the caller")
        if not isinstance(sizes.tokens, int):
            return Choice(FACTORED, f"the number of tokens is symbolic: {sizes.tokens}")
        tokens, least = f"{sizes.tokens:,} tokens", f"{sizes.break_even:,.0f}"
        if sizes.tokens < sizes.break_even:
            return Choice(FACTORED, f"{tokens}, under {least}: merging costs more")
        return Choice(MERGED, f"{tokens}, at least {least}: merging costs less")

    def flattens(self, *arrays: Any) -> bool:
        """Tell whether to merge adjacent axes, such as batch and sequence, before a product.

        XLA for CPU computes a contraction over (batch, sequence) much slower than one over tokens.
        On other platforms there is no gain, and merging two sharded axes requires a gather.
        """
        return self.platform == "cpu" and not any(map(_is_sharded, arrays))

    def _rounds(self, sizes: Sizes) -> str | None:
        """Return why W0 + scale * a · b has less precision than float32, or None."""
        for name, dtype in (("W0", sizes.w_dtype), ("x", sizes.x_dtype)):
            if jnp.finfo(dtype).bits < 32:
                return f"{name} is {jnp.dtype(dtype).name}"
        single = jnp.finfo(sizes.w_dtype).bits == 32
        if self.platform != "cpu" and single and not _is_exact(sizes.precision):
            return f"{self.platform} multiplies float32 with fewer bits at this precision"
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


def target_platform(arrays: Sequence[Any]) -> str:
    """Return the platform of the arrays, or the default backend if there are only tracers."""
    concrete = (x for x in arrays if isinstance(x, jax.Array) and not isinstance(x, Tracer))
    device = next((next(iter(array.sharding.device_set)) for array in concrete), None)
    platform: str = jax.default_backend() if device is None else device.platform
    return ALIASES.get(platform, platform)
