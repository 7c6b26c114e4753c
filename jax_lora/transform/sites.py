"""Sites: where in the user's code an operation came from, and what to say when it materialises."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import warnings
from typing import Any

from jax_lora.errors import ConfigError, MaterializeError, MaterializeWarning, explain
from jax_lora.labels import RANK
from jax_lora.lowrank import LowRank
from jax_lora.transform.forms import MATERIALIZED, check_form

POLICIES = ("warn", "error", "allow")
UNKNOWN = "an unknown place"


def _package_folder(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return os.path.dirname(spec.origin) + os.sep if spec is not None and spec.origin else None


# Frames of these packages are machinery: the reader wants the line of the model.
_MACHINERY = tuple(
    folder
    for folder in map(_package_folder, ("jax", "jaxlib", "flax", "jax_lora", "contextlib"))
    if folder is not None and not folder.endswith(f"python{os.sep}")
)


def location(eqn: Any) -> str:
    """Return the `file:line` in the user's code that an equation came from.

    Args:
      eqn: An equation of a jaxpr.

    Returns:
      The innermost frame outside of JAX, Flax and this package, or `UNKNOWN`.
    """
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        if not frame.file_name.startswith((*_MACHINERY, "<")):
            return f"{frame.file_name}:{frame.line_num}"
    return UNKNOWN


def check_policy(policy: str) -> str:
    """Refuse an `on_materialize` that is none of the three.

    Raises:
      ConfigError: An unknown policy.
    """
    if policy not in POLICIES:
        raise ConfigError(
            explain(
                "lora_apply: on_materialize",
                got=repr(policy),
                expected=f"one of {', '.join(POLICIES)}",
                fix='Leave it out for "warn".',
            )
        )
    return policy


def bias_error(path: str, operation: str, where: str) -> MaterializeError:
    """Build the error for a use of a kernel with a bias that the bias has no meaning in.

    Args:
      path: Path of the leaf.
      operation: Name of the operation.
      where: `file:line` of the operation.

    Returns:
      The error.
    """
    return MaterializeError(
        explain(
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
        message = explain(
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
      tokens: Rows of x that meet the kernel.
      inputs: Length of the sum.
      outputs: Results per token.
      rank: Rank of the factors.
      times: How often the place is run: the length of the scans around it.
      beside: Paths of the kernels that share their thin products with this one.
    """

    path: str
    where: str
    operation: str
    form: str
    why: str
    tokens: int
    inputs: int
    outputs: int
    rank: int
    times: int
    beside: tuple[str, ...]


class Settings:
    """What the caller of `lora_apply` asked for; compared by identity, as caches need it.

    Args:
      on_materialize: "warn", "error" or "allow".
      form: "auto", "factored" or "merged".
    """

    def __init__(self, on_materialize: str = "warn", form: str = "auto"):
        """Check both; nothing has been seen yet."""
        self.form = check_form(form)
        self.sites: dict[Site, None] = {}  # an ordered set: JAX may trace a program twice
        self._materializations = Materializations(on_materialize)

    def note(self, site: Site) -> None:
        """Write down what was chosen for a site."""
        self.sites[site] = None

    def materialized(self, value: LowRank, operation: str, where: str, times: int) -> None:
        """Say that a value is about to be formed, and write it down.

        Raises:
          MaterializeError: The policy is "error".
        """
        self._materializations.report(value.path, operation, where)
        why = "no low-rank rule for this operation"
        self.note(site_of(value, operation, where, MATERIALIZED, why, times=times))


def site_of(
    value: LowRank, operation: str, where: str, form: str, why: str, *, tokens: int = 0, times: int
) -> Site:
    """Describe a use of a value whose sides tell its sizes: inputs in `a`, outputs in `b`."""
    size = lambda side: math.prod(  # noqa: E731
        n for n, label in zip(value.shape, value.w_labels, strict=True) if value.side(label) == side
    )
    rank = value.a.shape[value.a_labels.index(RANK)]
    inputs, outputs = size((True, False)), size((False, True))
    return Site(value.path, where, operation, form, why, tokens, inputs, outputs, rank, times, ())
