"""Find the cheapest changes to a run that make it fit into a given memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from jax_lora.plan.arithmetic import Residuals
from jax_lora.plan.methods import Method, estimate
from jax_lora.plan.planned_model import PlannedModel, with_dtype
from jax_lora.plan.planning import Choices, method_of, step_of
from jax_lora.plan.residuals import trace_residuals

SHARE = 0.95  # of the memory that a plan may use; the formulas do not count everything
SHORTEST, SMALLEST_RANK = 128, 4  # limits of the search
_QUANTIZE = {
    "int8": (35, "stores the base in 8 bits, with a small error"),
    "nf4": (36, "stores the base in 4 bits, with a larger error"),
}


@dataclasses.dataclass(frozen=True)
class Change:
    """A change to a run.

    Args:
      cost: How undesirable the change is, to order changes by.
      flags: Flags of `train` that make the change.
      effect: Effect of the change, for display.
      values: Settings with their new values.
    """

    cost: int
    flags: str
    effect: str
    values: dict[str, Any]

    def apply(self, choices: Choices) -> Choices:
        """Return the choices with the change made."""
        settings = dataclasses.replace(choices.settings, **self.values)
        return dataclasses.replace(choices, settings=settings)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The result of a search.

    Args:
      fits: Whether the changes suffice.
      before: Bytes without changes.
      changes: The changes, cheapest first.
      totals: Bytes after each change.
      choices: The choices with all changes made.
    """

    fits: bool
    before: float
    changes: tuple[Change, ...]
    totals: tuple[float, ...]
    choices: Choices

    @property
    def after(self) -> float:
        """Bytes with all changes."""
        return self.totals[-1] if self.totals else self.before


def fit(
    choices: Choices, memory: float, total: Callable[[Choices], float], *, dtype: str, length: int
) -> Fit:
    """Search for the cheapest combination of changes that fits.

    Args:
      choices: The planned run.
      memory: Available bytes, of which 5% are left free.
      total: Computes the peak memory of choices, in bytes.
      dtype: Dtype of the base weights.
      length: Longest sequence length of the run.

    Returns:
      The changes, or no changes if the run fits already. If no combination fits, the one with the
      lowest peak memory.
    """
    before = total(choices)
    least = Fit(before <= SHARE * memory, before, (), (), choices)
    if least.fits:
        return least
    for changes in _combinations(choices, dtype, length):
        changed, totals = choices, []
        for change in changes:
            changed = change.apply(changed)
            totals.append(total(changed))
        found = Fit(totals[-1] <= SHARE * memory, before, changes, tuple(totals), changed)
        if found.fits:
            return found
        if not least.changes or found.after < least.after:
            least = found
    return least


def _combinations(choices: Choices, dtype: str, length: int) -> Iterator[tuple[Change, ...]]:
    """Yield every combination of changes, cheapest first."""
    kinds = _changes(choices, dtype, length)
    combinations = itertools.product(*([None, *changes] for changes in kinds))
    chosen = (tuple(change for change in each if change is not None) for each in combinations)
    ordered = sorted(chosen, key=lambda changes: sum(change.cost for change in changes))
    yield from (tuple(sorted(each, key=lambda change: change.cost)) for each in ordered if each)


def _changes(choices: Choices, dtype: str, length: int) -> Iterator[list[Change]]:
    """Yield the alternatives of each kind of change, at most one of which is made."""
    settings = choices.settings
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
    adapter = _as_adapter(settings.fine_tune_type)
    yield [*adapter, *_quantized(settings.quantize, adapter)]
    yield [
        Change(40 * n, f"--rank {rank}", "a smaller adapter", {"rank": rank})
        for n, rank in _halvings(settings.rank, SMALLEST_RANK)
    ]
    yield [
        Change(
            50 * n,
            f"--max-seq-length {shorter}",
            "truncates longer examples",
            {"max_seq_length": shorter},
        )
        for n, shorter in _halvings(length, SHORTEST)
    ]


def _as_adapter(fine_tune_type: str) -> list[Change]:
    if fine_tune_type != "full":
        return []
    effect = "trains an adapter instead of the base weights"
    return [Change(30, "--fine-tune-type lora", effect, {"fine_tune_type": "lora"})]


def _quantized(now: str, adapter: list[Change]) -> Iterator[Change]:
    """Yield changes to a quantized base, which only an adapter can be trained on."""
    for method, (cost, effect) in _QUANTIZE.items() if now == "none" else ():
        before = adapter[0] if adapter else Change(0, "", "", {})
        flags = f"{before.flags} --quantize {method}".strip()
        yield Change(before.cost + cost, flags, effect, before.values | {"quantize": method})


def _halvings(value: int, least: int) -> Iterator[tuple[int, int]]:
    """Yield 1, value / 2; 2, value / 4; and so on, down to `least`."""
    count = 1
    while (value := value // 2) >= least:
        yield count, value
        count += 1


def formula_total(model: PlannedModel, length: int, targets: int) -> Callable[[Choices], float]:
    """Return a function that computes the peak memory of choices on one device, by formula.

    Args:
      model: The model.
      length: Longest sequence length of the data.
      targets: Target tokens per example.
    """
    # Tracing dominates the search, and few of the choices change its results.
    models: dict[str, tuple[PlannedModel, Residuals | None]] = {}
    methods: dict[tuple[int, str, str], Method] = {}

    def total(choices: Choices) -> float:
        settings = choices.settings
        dtype = settings.dtype
        if dtype not in models:
            cast = with_dtype(model, dtype)
            models[dtype] = cast, trace_residuals(cast, settings)
        key = (settings.rank, settings.fine_tune_type, dtype)
        if key not in methods:
            methods[key] = method_of(models[dtype][0], choices, models[dtype][1])
        method = dataclasses.replace(methods[key], quantize=settings.quantize)
        cut = min(length, settings.max_seq_length)
        return estimate(method, step_of(choices, cut, min(targets, cut))).total

    return total
