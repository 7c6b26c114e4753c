"""Sites: the places at which a function uses adapted weights, and the warnings about them."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

from jax_lora.algebra.low_rank import LowRank
from jax_lora.algebra.named_axes import RANK
from jax_lora.errors import ConfigError, MaterializeError, MaterializeWarning, format_error
from jax_lora.transform.strategies import ALIASES, FORMS, MATERIALIZED, PLATFORMS, Choice

POLICIES = ("warn", "error", "allow")


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of a low-rank value, and the form in which it is computed."""

    path: str  # of the leaf
    where: str  # `file:line` in the user's code
    operation: str
    form: str  # "factored", "merged" or "materialized"
    why: str  # the reason for the form
    inputs: int  # of the kernel
    outputs: int
    rank: int
    times: int  # how often the operation runs: the length of the scans around it
    tokens: Any = 0  # number of vectors that are multiplied with the kernel
    beside: tuple[str, ...] = ()  # paths of the kernels that share the down-projection


class Settings:
    """The arguments of `lora_apply`, and the sites found so far. Compared by identity, for caches.

    Raises:
      ConfigError: A value is unknown.
    """

    def __init__(
        self, on_materialize: str = "warn", form: str = "auto", platform: str | None = None
    ):
        """Validate the arguments, and start without sites."""
        self._policy = _one_of("on_materialize", on_materialize, POLICIES)
        self.form = _one_of("form", form, FORMS)
        known = ALIASES.get(platform or "", platform)
        self.platform = known if known is None else _one_of("platform", known, PLATFORMS)
        self.sites: dict[Site, None] = {}  # an ordered set: JAX may trace a function twice
        self._reported: set[tuple[str, str, str]] = set()

    def note(self, value: LowRank, choice: Choice, **known: Any) -> None:
        """Record a use of a value; missing sizes follow from its axes."""

        def size(side: tuple[bool, bool]) -> int:
            sides = zip(value.shape, map(value.side, value.axes), strict=True)
            return math.prod(n for n, each in sides if each == side)

        known = {"inputs": size((True, False)), "outputs": size((False, True)), **known}
        rank = value.factors[0].size_of(RANK)
        self.sites[Site(value.path, form=choice.form, why=choice.why, rank=rank, **known)] = None

    def materialize(self, value: LowRank, operation: str, where: str, times: int) -> None:
        """Record that an operation without a rule needs the full weight; report it once per site.

        Raises:
          MaterializeError: The value has an addend, or `on_materialize` is "error".
        """
        at = f"lora_apply: {value.path} at {where}"
        if value.addend is not None:
            raise MaterializeError(
                at,
                got=f"the operation {operation} on a kernel whose pair has a bias",
                expected="a product of data with the kernel that sums over exactly its input axes",
                fix="The bias is added to the result of such a product and is not part of the "
                "weight. Exclude this kernel, or remove its bias.",
            )
        if not value.is_matrix:
            return  # a single row or column costs nothing
        if self._policy != "allow" and (value.path, operation, where) not in self._reported:
            self._reported.add((value.path, operation, where))
            message = format_error(
                at,
                got=f"the operation {operation}, which has no low-rank rule for this use",
                expected="a contraction, a lookup, a convolution, or a reshape, slice or cast",
                fix="The full weight is materialized there: correct, but slower. Pass "
                'on_materialize="allow" to accept it, or exclude the kernel.',
            )
            if self._policy == "error":
                raise MaterializeError(message)
            warnings.warn(message, MaterializeWarning, stacklevel=1)
        choice = Choice(MATERIALIZED, "no low-rank rule for this operation")
        self.note(value, choice, where=where, operation=operation, times=times)


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value in known:
        return value
    raise ConfigError(
        f"lora_apply: {name}",
        got=repr(value),
        expected=f"one of {', '.join(known)}",
        fix="Omit it for the default.",
    )
