"""What JAX keeps of a forward pass for the backward pass, read off the traced program."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jax_lora.adapter import combine
from jax_lora.finetune.loss import summed_loss
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.arithmetic import Kept
from jax_lora.plan.planned_model import PlannedModel
from jax_lora.plan.program import abstract_adapter, abstract_batch
from jax_lora.transform import lora_apply

# No size of a model is equal to one of these, or to a product of two, so that weights are told from
# activations. So many rows have the tokens from which on merged weights are chosen.
_LENGTHS = (61, 127)
_ROWS = 127


def kept_by(model: PlannedModel, settings: TrainSettings) -> Kept | None:
    """Trace a model's loss at two lengths, and take what it keeps apart by how it grows.

    Nothing is compiled, so a model of any size takes less than a second. XLA may keep less, where
    it fuses, or more, where it copies.

    Args:
      model: The model.
      settings: Rank and targets.

    Returns:
      Bytes for each token; None for a model that is no decoder, or whose rows are too short.
    """
    if model.module is None or not model.decodes or model.longest < max(_LENGTHS):
        return None
    plain, remat = (_line(model, settings, remat) for remat in (False, True))
    return Kept(*plain, *remat)


def _line(model: PlannedModel, settings: TrainSettings, remat: bool) -> tuple[float, float]:
    """Bytes of a token as fixed + by_length * length."""
    short, long = _LENGTHS
    at_short, at_long = (
        _kept(model, settings, length, remat) / (_ROWS * length) for length in _LENGTHS
    )
    by_length = (at_long - at_short) / (long - short)
    return at_short - by_length * short, by_length


def _kept(model: PlannedModel, settings: TrainSettings, length: int, remat: bool) -> int:
    """Count the bytes that rows keep, but for parameters, factors and logits."""
    module = model.module.clone(remat=remat)
    loss = lora_apply(lambda variables, batch: summed_loss(module, variables, batch)[0])
    adapter = abstract_adapter(model, settings)
    rows = dataclasses.replace(settings, batch_size=_ROWS, grad_accumulation_steps=1)
    batch = abstract_batch(rows, length, length)

    def forward(adapter: Any, variables: Any, batch: Any) -> Any:
        return jax.vjp(lambda adapter: loss(combine(variables, adapter), batch), adapter)[1]

    jaxpr = jax.make_jaxpr(forward)(adapter, model.variables, batch).jaxpr
    given = {id(var) for var in jaxpr.invars}
    kept = {id(var): var.aval for var in jaxpr.outvars if id(var) not in given}
    # A scan hands its stacks of weights on; in the compiled program they are its arguments.
    known = {tuple(leaf.shape) for leaf in jax.tree.leaves((adapter, model.variables))}
    return sum(
        math.prod(aval.shape) * aval.dtype.itemsize
        for aval in kept.values()
        if aval.shape not in known
        and not _is_unstacked(aval.shape, known)
        and aval.shape[-1:] != (model.shape.vocabulary,)
    )


def _is_unstacked(shape: tuple[int, ...], known: set[tuple[int, ...]]) -> bool:
    """Whether it is a weight with an axis of 1, or a table the other way round."""
    bare = tuple(size for size in shape if size != 1)
    return bare in known or bare[::-1] in known
