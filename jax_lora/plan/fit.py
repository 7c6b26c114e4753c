"""Find the cheapest changes to a run that make it fit into a given memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.arithmetic import Residuals
from jax_lora.plan.methods import Method, estimate
from jax_lora.plan.planned_model import PlannedModel, with_dtype
from jax_lora.plan.planning import method_of, step_of
from jax_lora.plan.residuals import trace_residuals

SHARE = 0.95  # of the memory is available to a plan: the formulas do not count everything
SHORTEST, SMALLEST_RANK = 128, 4  # limits of the search
_QUANTIZE = {
    "int8": (35, "stores the base in 8 bits, with a small error"),
    "nf4": (36, "stores the base in 4 bits, with a larger error"),
}


@dataclasses.dataclass(frozen=True)
class Change:
    """A change to a run."""

    cost: int  # how undesirable the change is, to order changes by
    flags: str  # of `train`, which make the change
    effect: str  # for display
    values: dict[str, Any]  # settings with their new values


@dataclasses.dataclass(frozen=True)
class Fit:
    """The result of a search."""

    fits: bool  # whether the changes suffice
    before: float  # bytes without changes
    changes: tuple[Change, ...]  # cheapest first
    totals: tuple[float, ...]  # bytes after each change
    settings: TrainSettings  # with all changes made

    @property
    def after(self) -> float:
        """Bytes with all changes."""
        return self.totals[-1] if self.totals else self.before


def fit(
    settings: TrainSettings,
    memory: float,
    total: Callable[[TrainSettings], float],
    *,
    dtype: str,
    length: int,
) -> Fit:
    """Search for the cheapest combination of changes that fits into `memory` bytes, less 5%.

    `total` computes the peak memory of settings, `dtype` is that of the base weights, and `length`
    the longest sequence of the run.

    Returns:
      The changes, or no changes if the run fits already. If no combination fits, the one with the
      lowest peak memory.
    """
    before = total(settings)
    lowest = Fit(before <= SHARE * memory, before, (), (), settings)
    if lowest.fits:
        return lowest
    for changes in _combinations(settings, dtype, length):
        changed, totals = settings, []
        for change in changes:
            changed = dataclasses.replace(changed, **change.values)
            totals.append(total(changed))
        found = Fit(totals[-1] <= SHARE * memory, before, changes, tuple(totals), changed)
        if found.fits:
            return found
        if not lowest.changes or found.after < lowest.after:
            lowest = found
    return lowest


def _combinations(settings: TrainSettings, dtype: str, length: int) -> Iterator[tuple[Change, ...]]:
    """Yield every combination of changes, cheapest first."""
    kinds = _changes(settings, dtype, length)
    combinations = itertools.product(*([None, *changes] for changes in kinds))
    chosen = (tuple(change for change in each if change is not None) for each in combinations)
    ordered = sorted(chosen, key=lambda changes: sum(change.cost for change in changes))
    yield from (tuple(sorted(each, key=lambda change: change.cost)) for each in ordered if each)


def _changes(settings: TrainSettings, dtype: str, length: int) -> Iterator[list[Change]]:
    """Yield the alternatives of each kind of change, at most one of which is made."""
    batches, batch_size, accumulation = [], settings.batch_size, settings.grad_accumulation_steps
    while batch_size % 2 == 0:
        batch_size, accumulation = batch_size // 2, accumulation * 2
        flags = f"--batch-size {batch_size} --grad-accumulation-steps {accumulation}"
        values = {"batch_size": batch_size, "grad_accumulation_steps": accumulation}
        effect = "the same update, in more steps of accumulation"
        batches.append(Change(len(batches) + 1, flags, effect, values))
    yield batches
    if not settings.grad_checkpoint and settings.remat != "full":
        effect = "the same result, with about a third more operations"
        yield [Change(12, "--remat full", effect, {"remat": "full"})]
    if dtype == "float32":
        effect = "a 16-bit base and a float32 adapter; slow on a CPU"
        yield [Change(14, "--dtype bfloat16", effect, {"dtype": "bfloat16"})]
    bases, before = [], Change(0, "", "", {})
    if settings.fine_tune_type == "full":  # only an adapter can be trained on a quantized base
        effect = "trains an adapter instead of the base weights"
        before = Change(30, "--fine-tune-type lora", effect, {"fine_tune_type": "lora"})
        bases.append(before)
    for method, (cost, effect) in _QUANTIZE.items() if settings.quantize == "none" else ():
        flags = f"{before.flags} --quantize {method}".strip()
        values = before.values | {"quantize": method}
        bases.append(Change(before.cost + cost, flags, effect, values))
    yield bases
    for cost, name, value, least, effect in (
        (40, "rank", settings.rank, SMALLEST_RANK, "a smaller adapter"),
        (50, "max_seq_length", length, SHORTEST, "truncates longer examples"),
    ):
        flag = f"--{name.replace('_', '-')}"
        yield [
            Change(cost * n, f"{flag} {smaller}", effect, {name: smaller})
            for n, smaller in enumerate(_halvings(value, least), start=1)
        ]


def _halvings(value: int, least: int) -> Iterator[int]:
    """Yield value // 2, value // 4 and so on, while the value is at least `least`."""
    while (value := value // 2) >= least:
        yield value


def formula_total(
    model: PlannedModel, length: int, targets: int
) -> Callable[[TrainSettings], float]:
    """Create the argument `total` of `fit`: peak memory on one device, by formula.

    `length` is the longest sequence of the data, with `targets` target tokens per example.
    """
    # Most of the time of the search is tracing, so its results are cached by what changes them.
    models: dict[str, tuple[PlannedModel, Residuals | None]] = {}
    methods: dict[tuple[int, str, str], Method] = {}

    def total(settings: TrainSettings) -> float:
        dtype = settings.dtype
        if dtype not in models:
            cast = with_dtype(model, dtype)
            models[dtype] = cast, trace_residuals(cast, settings)
        key = (settings.rank, settings.fine_tune_type, dtype)
        if key not in methods:
            methods[key] = method_of(models[dtype][0], settings, models[dtype][1])
        method = dataclasses.replace(methods[key], quantize=settings.quantize)
        cut = min(length, settings.max_seq_length)
        return estimate(method, step_of(settings, cut, min(targets, cut))).total

    return total
