"""Fine-tuning: a step and a training loop for any model, losses, callbacks, and checkpoints.

step = jl.finetune.make_step(loss_fn, optimizer)             a loop of your own
jl.finetune.Trainer(loss_fn, variables, adapter, optimizer, batches, run="run").train()
"""

from jax_lora.finetune.callbacks import Callback, Checkpoint, EarlyStop, Report, Validate
from jax_lora.finetune.losses import (
    causal_lm_loss,
    classification_loss,
    masked_lm_loss,
    seq2seq_loss,
)
from jax_lora.finetune.step import StepReport, TrainState, init_state, make_step
from jax_lora.finetune.trainer import NonFiniteLossError, Trainer

__all__ = [
    "Callback",
    "Checkpoint",
    "EarlyStop",
    "NonFiniteLossError",
    "Report",
    "StepReport",
    "TrainState",
    "Trainer",
    "Validate",
    "causal_lm_loss",
    "classification_loss",
    "init_state",
    "make_step",
    "masked_lm_loss",
    "seq2seq_loss",
]
