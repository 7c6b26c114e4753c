"""Measure the residuals that JAX keeps for the backward pass, from the traced loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jax_lora.adapter import combine
from jax_lora.finetune.losses import causal_lm_loss
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.arithmetic import Residuals
from jax_lora.plan.compiled_step import abstract_adapter, abstract_batch
from jax_lora.plan.planned_model import PlannedModel
from jax_lora.transform import lora_apply

# Primes that are not the size of any model, nor the product of two sizes, so that shapes tell
# activations from weights. The batch has enough tokens for `lora_apply` to choose the merged form
# wherever a real step would.
_LENGTHS = (61, 127)
_BATCH_SIZE = 127


def trace_residuals(model: PlannedModel, settings: TrainSettings) -> Residuals | None:
    """Trace the loss of a model at two sequence lengths, and fit its bytes per token to a line.

    Nothing is compiled, so this takes less than a second for a model of any size. XLA may keep
    less, where it fuses operations, or more, where it copies arrays. Only decoders with at least
    127 positions are traced; None for other models.
    """
    if model.module is None or not model.decodes or model.max_length < max(_LENGTHS):
        return None
    lines = []
    for remat in (False, True):
        short, long = (
            _residual_bytes(model, settings, length, remat) / (_BATCH_SIZE * length)
            for length in _LENGTHS
        )  # bytes per token
        by_length = (long - short) / (_LENGTHS[1] - _LENGTHS[0])
        lines += [short - by_length * _LENGTHS[0], by_length]
    return Residuals(*lines)


def _residual_bytes(model: PlannedModel, settings: TrainSettings, length: int, remat: bool) -> int:
    """Sum the residuals of a batch, except parameters, adapter weights and logits."""
    module = model.module.clone(remat="full" if remat else "none")
    loss = lora_apply(lambda variables, batch: causal_lm_loss(module, variables, batch)[0])
    adapter = abstract_adapter(model, settings)
    one_step = dataclasses.replace(settings, batch_size=_BATCH_SIZE, grad_accumulation_steps=1)
    batch = abstract_batch(one_step, length, length)

    def forward(adapter: Any, variables: Any, batch: Any) -> Any:
        return jax.vjp(lambda adapter: loss(combine(variables, adapter), batch), adapter)[1]

    jaxpr = jax.make_jaxpr(forward)(adapter, model.variables, batch).jaxpr
    inputs = {id(var) for var in jaxpr.invars}
    saved = {id(var): var.aval for var in jaxpr.outvars if id(var) not in inputs}
    # A scan returns its stacked weights; in the compiled function they alias the arguments.
    weights = {tuple(leaf.shape) for leaf in jax.tree.leaves((adapter, model.variables))}
    return sum(
        math.prod(aval.shape) * aval.dtype.itemsize
        for aval in saved.values()
        if not _is_weight(aval.shape, weights) and aval.shape[-1:] != (model.shape.vocab_size,)
    )


def _is_weight(shape: tuple[int, ...], weights: set[tuple[int, ...]]) -> bool:
    """Return whether a shape is that of a weight, also with axes of size 1 or transposed."""
    squeezed = tuple(size for size in shape if size != 1)
    return shape in weights or squeezed in weights or squeezed[::-1] in weights
