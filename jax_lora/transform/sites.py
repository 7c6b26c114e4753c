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
from jax_lora.transform.strategies import ALIASES, FORMS, MATERIALIZED, PLATFORMS

POLICIES = ("warn", "error", "allow")


def addend_error(path: str, operation: str, where: str) -> MaterializeError:
    """Build the error for an operation, at `file:line`, that cannot apply the bias of a pair."""
    return MaterializeError(
        format_error(
            f"lora_apply: {path} at {where}",
            got=f"the operation {operation} on a kernel whose pair has a bias",
            expected="a product of data with the kernel that sums over exactly its input axes",
            fix="The bias is added to the result of such a product and is not part of the weight. "
            "Exclude this kernel, or remove its bias.",
        )
    )


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of a low-rank value, and the form in which it is computed.

    Args:
      path: Path of the leaf.
      where: `file:line` in the user's code.
      operation: Name of the operation.
      form: "factored", "merged" or "materialized".
      why: The reason for the form.
      inputs: Number of inputs of the kernel.
      outputs: Number of outputs of the kernel.
      rank: Rank of the factors.
      times: How often the operation runs: the length of the scans around it.
      tokens: Number of vectors that are multiplied with the kernel.
      beside: Paths of the kernels that share the down-projection.
    """

    path: str
    where: str
    operation: str
    form: str
    why: str
    inputs: int
    outputs: int
    rank: int
    times: int
    tokens: Any = 0
    beside: tuple[str, ...] = ()


class Settings:
    """The arguments of `lora_apply`, and the sites found so far. Compared by identity, for caches.

    Args:
      on_materialize: "warn", "error" or "allow".
      form: "auto", "factored" or "merged".
      platform: The target platform, or None for the platform of the inputs.

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

    def note(self, site: Site) -> None:
        """Record a site."""
        self.sites[site] = None

    def materialized(self, value: LowRank, operation: str, where: str, times: int) -> None:
        """Record that an operation without a rule materializes a weight; report it once per site.

        Raises:
          MaterializeError: `on_materialize` is "error".
        """
        self._report((value.path, operation, where))
        site = site_of(
            value,
            where=where,
            operation=operation,
            times=times,
            form=MATERIALIZED,
            why="no low-rank rule for this operation",
        )
        self.note(site)

    def _report(self, site: tuple[str, str, str]) -> None:
        if self._policy == "allow" or site in self._reported:
            return
        self._reported.add(site)
        path, operation, where = site
        message = format_error(
            f"lora_apply: {path} at {where}",
            got=f"the operation {operation}, which has no low-rank rule for this use",
            expected="a contraction, a lookup, a convolution, or a reshape, slice or cast",
            fix="The full weight is materialized there: correct, but slower. Pass "
            'on_materialize="allow" to accept it, or exclude the kernel.',
        )
        if self._policy == "error":
            raise MaterializeError(message)
        warnings.warn(message, MaterializeWarning, stacklevel=2)


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value in known:
        return value
    raise ConfigError(
        format_error(
            f"lora_apply: {name}",
            got=repr(value),
            expected=f"one of {', '.join(known)}",
            fix="Omit it for the default.",
        )
    )


def site_of(
    value: LowRank, *, inputs: int | None = None, outputs: int | None = None, **known: Any
) -> Site:
    """Describe a use of a value; missing sizes follow from its axes."""

    def size(side: tuple[bool, bool]) -> int:
        sides = zip(value.shape, map(value.side, value.axes), strict=True)
        return math.prod(n for n, each in sides if each == side)

    return Site(
        path=value.path,
        rank=value.factors[0].size_of(RANK),
        inputs=size((True, False)) if inputs is None else inputs,
        outputs=size((False, True)) if outputs is None else outputs,
        **known,
    )
