"""explain: how lora_apply computes every use of an adapted kernel, and why."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_lora.adapter import is_adapted, not_combined
from jax_lora.printable import printable
from jax_lora.transform.apply import with_settings
from jax_lora.transform.sites import Settings, Site
from jax_lora.transform.tracing import ArrayFunction


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The sites at which a function uses adapted kernels; `print` shows them as a table.

    Args:
      sites: The sites in execution order.
    """

    sites: tuple[Site, ...]

    def __str__(self) -> str:
        """Format a table with one row per group of equal sites."""
        rows = [_HEADER, *map(_row, _alike(self.sites))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        layout = [f"{side}{width}" for side, width in zip(_SIDES, widths, strict=True)]
        return "\n".join("  ".join(map(format, row, layout)).rstrip() for row in rows)


def explain(fn: Callable[..., Any], *args: Any, form: str = "auto", **kwargs: Any) -> Explanation:
    """Show how `lora_apply(fn, form=form)` computes each contraction with adapted kernels.

    Use it to find out why a step is slow: at a site with the form "materialized", the full weight
    is computed. The function is traced and not run.

    Args:
      fn: The function that is passed to `lora_apply`.
      *args: Its arguments, with `LoraWeight` leaves. A `jax.ShapeDtypeStruct` can replace an array.
      form: As in `lora_apply`.
      **kwargs: Its keyword arguments.

    Returns:
      An `Explanation`: `print` shows it as a table, and `.sites` holds its rows.

    Raises:
      ConfigError: `form` is unknown.
      StructureError: No argument has an adapter.

    Example:
      >>> import jax, jax.numpy as jnp, jax_lora as jl
      >>> model = lambda params, x: (x @ params["gate"]["kernel"]) * (x @ params["up"]["kernel"])
      >>> params = {name: {"kernel": jnp.ones((64, 64))} for name in ("gate", "up")}
      >>> adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=4))
      >>> sites = jl.explain(model, jl.combine(params, adapter), jnp.ones((512, 64))).sites
      >>> sites[0].form, sites[0].beside
      ('merged', ('up/kernel',))
    """
    settings = Settings("allow", form)
    if not any(map(is_adapted, jax.tree.leaves((args, kwargs), is_leaf=is_adapted))):
        raise not_combined("explain", "an argument from jl.combine(variables, adapter)")
    is_array = lambda _, leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)  # noqa: E731
    function = ArrayFunction(with_settings(fn, settings), args, kwargs, is_array)
    jax.eval_shape(function, *function.inputs.values())
    return Explanation(tuple(settings.sites))


_HEADER = ("kernel", "form", "tokens", "in", "out", "rank", "runs", "at", "why")
_SIDES = "<<>>>>><<"  # alignment of the columns


def _alike(sites: Sequence[Site]) -> list[list[Site]]:
    """Group sites that differ only in the numbers in their paths, such as layer indices."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        key = dataclasses.replace(site, path=_without_numbers(site.path), beside=())
        groups.setdefault((key, len(site.beside)), []).append(site)
    return list(groups.values())


def _without_numbers(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _row(sites: Sequence[Site]) -> tuple[str, ...]:
    site = sites[0]
    names = site.path if len(sites) == 1 else f"{_without_numbers(site.path)} ({len(sites)})"
    folder, line = os.path.split(site.where)
    shared = f"; shares x with {len(site.beside)} more" if site.beside else ""
    return (
        printable(names, keep=""),
        site.form,
        _count(site.tokens),
        f"{site.inputs:,}",
        f"{site.outputs:,}",
        str(site.rank),
        f"{site.times:,}",
        os.path.join(os.path.basename(folder), line),
        f"{site.operation}: {site.why}{shared}",
    )


def _count(tokens: Any) -> str:
    """Format a number of tokens, which may be symbolic."""
    if not isinstance(tokens, int):
        return str(tokens)
    return f"{tokens:,}" if tokens else ""
