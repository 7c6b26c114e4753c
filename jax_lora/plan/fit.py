"""What to change so that a run fits a memory, in the order of what costs least."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

from jax_lora.plan.arithmetic import Kept
from jax_lora.plan.methods import Method, estimate
from jax_lora.plan.planned_model import PlannedModel, with_dtype
from jax_lora.plan.planning import Choices, method_of, work_of
from jax_lora.plan.residuals import kept_by

SHARE = 0.95  # of the memory that a plan may fill; the rest is for what no formula sees
SHORTEST, SMALLEST_RANK = 128, 4  # what is not gone below
NOT_YET = "by formula; not a training mode of this command yet"


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing to change.

    Args:
      cost: What it costs, as a number to order by; 0 for no change.
      flags: What to type.
      says: What it costs, in words.
      to: The choices with the change made.
    """

    cost: int
    flags: str
    says: str
    to: Callable[[Choices], Choices]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Changes that make a run fit, or go as far as changes go.

    Args:
      fits: Whether they are enough.
      before: Bytes without any.
      changes: What to change, cheapest first.
      totals: Bytes after each of them.
      choices: With all of them made.
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
    """Find the cheapest changes that fit.

    Args:
      choices: What is planned.
      memory: Bytes that there are; a twentieth is left free.
      total: Counts the bytes of choices.
      dtype: Type of the base now.
      length: Tokens of the longest row now.

    Returns:
      The changes, none if it fits as it is. Where nothing fits: those that take the least.
    """
    before, least = total(choices), None
    if before <= SHARE * memory:
        return Fit(True, before, (), (), choices)
    for changes in _by_cost(choices, dtype, length):
        found = _made(choices, changes, total, before)
        if found.after <= SHARE * memory:
            return dataclasses.replace(found, fits=True)
        if least is None or found.after < least.after:
            least = found
    return least or Fit(False, before, (), (), choices)


def _made(
    choices: Choices,
    changes: tuple[Change, ...],
    total: Callable[[Choices], float],
    before: float,
) -> Fit:
    """Make changes one after the other, and count after each."""
    totals = []
    for change in changes:
        choices = change.to(choices)
        totals.append(total(choices))
    return Fit(False, before, changes, tuple(totals), choices)


def _by_cost(choices: Choices, dtype: str, length: int) -> Iterator[tuple[Change, ...]]:
    """Every combination of changes, the cheapest first."""
    combinations = itertools.product(
        _smaller_batches(choices),
        _remat(choices),
        _dtype(dtype),
        _method(choices),
        _ranks(choices),
        _lengths(length),
        _quantized(choices),
    )
    some = (tuple(change for change in each if change.cost) for each in combinations)
    ordered = sorted(some, key=lambda changes: sum(change.cost for change in changes))
    yield from (tuple(sorted(each, key=lambda change: change.cost)) for each in ordered if each)


_NONE = Change(0, "", "", lambda choices: choices)


def _smaller_batches(choices: Choices) -> list[Change]:
    """Fewer rows in memory and as many in an update."""
    rows, parts = choices.settings.batch_size, choices.settings.grad_accumulation_steps
    changes, cost = [_NONE], 0
    while rows % 2 == 0:
        rows, parts, cost = rows // 2, parts * 2, cost + 1
        values = {"batch_size": rows, "grad_accumulation_steps": parts}
        flags = f"--batch-size {rows} --grad-accumulation-steps {parts}"
        changes.append(Change(cost, flags, "the same update, in parts", _set(values)))
    return changes


def _remat(choices: Choices) -> list[Change]:
    if choices.remat:
        return [_NONE]
    says = "the same numbers, about a third more operations"
    to = lambda choices: dataclasses.replace(choices, remat=True)  # noqa: E731
    return [_NONE, Change(12, "--grad-checkpoint", says, to)]


def _dtype(dtype: str) -> list[Change]:
    if dtype != "float32":
        return [_NONE]
    says = "the base in 16 bits, factors in 32; slow on a CPU"
    return [_NONE, Change(14, "--dtype bfloat16", says, _set({"dtype": "bfloat16"}))]


def _method(choices: Choices) -> list[Change]:
    if choices.method != "full":
        return [_NONE]
    says = "trains factors and not the base"
    to = lambda choices: dataclasses.replace(choices, method="lora")  # noqa: E731
    return [_NONE, Change(30, "--fine-tune-type lora", says, to)]


def _ranks(choices: Choices) -> list[Change]:
    rank, changes = choices.settings.rank, [_NONE]
    while rank // 2 >= SMALLEST_RANK:
        rank //= 2
        cost = 40 * len(changes)
        changes.append(Change(cost, f"--rank {rank}", "fewer factors", _set({"rank": rank})))
    return changes


def _lengths(length: int) -> list[Change]:
    changes = [_NONE]
    while length // 2 >= SHORTEST:
        length //= 2
        flags, says = f"--max-seq-length {length}", "longer rows are cut"
        cost = 50 * len(changes)
        changes.append(Change(cost, flags, says, _set({"max_seq_length": length})))
    return changes


def _quantized(choices: Choices) -> list[Change]:
    if choices.quantize != "none":
        return [_NONE]

    def to(kind: str) -> Callable[[Choices], Choices]:
        return lambda choices: dataclasses.replace(choices, quantize=kind)

    return [
        _NONE,
        Change(1000, "int8 base", NOT_YET, to("int8")),
        Change(1001, "NF4 base", NOT_YET, to("nf4")),
    ]


def _set(values: Mapping[str, object]) -> Callable[[Choices], Choices]:
    def to(choices: Choices) -> Choices:
        settings = dataclasses.replace(choices.settings, **values)  # pyright: ignore[reportArgumentType]
        return dataclasses.replace(choices, settings=settings)

    return to


def formula_total(model: PlannedModel, length: int, learned: int) -> Callable[[Choices], float]:
    """Make the function that counts the bytes of choices on one device, by formula.

    Args:
      model: The model, in the type that it is planned in.
      length: Tokens of the longest row there is.
      learned: Of which so many are learned.

    Returns:
      A function of choices.
    """
    models: dict[str, tuple[PlannedModel, Kept | None]] = {}
    known: dict[tuple[int, str, str], Method] = {}

    def total(choices: Choices) -> float:
        dtype = choices.settings.dtype
        if dtype not in models:
            of_type = with_dtype(model, dtype)
            models[dtype] = of_type, kept_by(of_type, choices.settings)
        key = (choices.settings.rank, choices.method, dtype)
        if key not in known:
            of_type, kept = models[dtype]
            known[key] = method_of(of_type, choices, kept)
        cut = min(length, choices.settings.max_seq_length)
        method = dataclasses.replace(known[key], quantize=choices.quantize)
        return estimate(method, work_of(choices, cut, min(learned, cut))).total

    return total
