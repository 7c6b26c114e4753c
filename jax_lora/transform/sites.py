"""Sites: what `lora_apply` did at each place that uses a weight, and what it says about it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

from jax_lora.algebra.low_rank import LowRank
from jax_lora.algebra.named_axes import RANK
from jax_lora.errors import ConfigError, MaterializeError, MaterializeWarning, format_error
from jax_lora.transform.strategies import MATERIALIZED, check_form, check_platform

POLICIES = ("warn", "error", "allow")


def check_policy(policy: str) -> str:
    """Refuse an `on_materialize` that is none of the three.

    Raises:
      ConfigError: An unknown policy.
    """
    if policy not in POLICIES:
        raise ConfigError(
            format_error(
                "lora_apply: on_materialize",
                got=repr(policy),
                expected=f"one of {', '.join(POLICIES)}",
                fix='Leave it out for "warn".',
            )
        )
    return policy


def addend_error(path: str, operation: str, where: str) -> MaterializeError:
    """Build the error for a use of a kernel to which the bias of its pair does not apply.

    Args:
      path: Path of the leaf.
      operation: Name of the operation.
      where: `file:line` of the operation.

    Returns:
      The error.
    """
    return MaterializeError(
        format_error(
            f"lora_apply: {path} at {where}",
            got=f"the operation {operation}, on a kernel whose pair has a bias",
            expected="data times the kernel, summed over all of its inputs and over nothing else",
            fix="The bias belongs to that product's result and is no part of any weight. Leave "
            "this kernel out, or drop its bias.",
        )
    )


class Materializations:
    """Says once per site that a weight was formed, in the way that the policy asks for."""

    def __init__(self, policy: str):
        """Keep the policy; nothing has been said yet."""
        self.policy = check_policy(policy)
        self._said: set[tuple[str, str, str]] = set()

    def report(self, path: str, operation: str, where: str) -> None:
        """Warn, raise or keep quiet about one weight that is about to be formed.

        Args:
          path: Path of the leaf.
          operation: Name of the operation that has no low-rank rule.
          where: `file:line` of the operation.

        Raises:
          MaterializeError: The policy is "error".
        """
        site = (path, operation, where)
        if self.policy == "allow" or site in self._said:
            return
        self._said.add(site)
        message = format_error(
            f"lora_apply: {path} at {where}",
            got=f"the operation {operation}, which has no low-rank rule for it",
            expected="a contraction, a lookup, a convolution, or a reshape, slice or cast",
            fix='The full weight is formed there: right, but slower. Pass on_materialize="allow" '
            "to accept it, or exclude the kernel.",
        )
        if self.policy == "error":
            raise MaterializeError(message)
        warnings.warn(message, MaterializeWarning, stacklevel=2)


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where a program uses a low-rank value, and how it is computed there.

    Args:
      path: Path of the leaf.
      where: `file:line` in the user's code.
      operation: Name of the operation.
      form: "factored", "merged" or "materialized".
      why: The reason for the form.
      inputs: Length of the sum.
      outputs: Results per token.
      rank: Rank of the factors.
      times: How often the place is run: the length of the scans around it.
      tokens: Rows of x that are multiplied with the kernel.
      beside: Paths of the kernels that share their down-projection with this one.
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
    """What the caller of `lora_apply` asked for; compared by identity, as caches need it.

    Args:
      on_materialize: "warn", "error" or "allow".
      form: "auto", "factored" or "merged".
      platform: The target, or None for that of the inputs.
    """

    def __init__(
        self, on_materialize: str = "warn", form: str = "auto", platform: str | None = None
    ):
        """Check all of them; nothing has been seen yet."""
        self.form = check_form(form)
        self.platform = check_platform(platform)
        self.sites: dict[Site, None] = {}  # an ordered set: JAX may trace a program twice
        self._materializations = Materializations(on_materialize)

    def note(self, site: Site) -> None:
        """Record how a weight is used at a site."""
        self.sites[site] = None

    def materialized(self, value: LowRank, operation: str, where: str, times: int) -> None:
        """Report that a full weight is about to be computed, and record it.

        Raises:
          MaterializeError: The policy is "error".
        """
        self._materializations.report(value.path, operation, where)
        why = "no low-rank rule for this operation"
        place: dict[str, Any] = {"where": where, "operation": operation, "times": times}
        self.note(site_of(value, form=MATERIALIZED, why=why, **place))


def site_of(
    value: LowRank, *, inputs: int | None = None, outputs: int | None = None, **known: Any
) -> Site:
    """Describe a use of a value; its own axes tell the sizes that are not given."""

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
