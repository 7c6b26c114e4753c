"""The compiled training steps of a run, one per batch shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.finetune.memory import release_freed_memory
from jax_lora.finetune.step import TrainState


class StepCache:
    """Compiles the step for every batch shape that occurs.

    Args:
      step: From `make_step`.
      trainer: The `Trainer`; its callbacks are called for every compilation.
    """

    def __init__(self, step: Any, trainer: Any):
        """Start with an empty cache."""
        self._step, self._trainer = step, trainer
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.seconds = 0.0
        self.planned_bytes = 0

    def __len__(self) -> int:
        """Count the compiled steps."""
        return len(self._compiled)

    def __contains__(self, batch: Any) -> bool:
        """Whether the step for a batch of this shape is compiled."""
        return _shape(batch) in self._compiled

    def compiled(self, state: TrainState, frozen: Any, batch: Any) -> Callable[..., Any]:
        """Return the compiled step for a batch; compile it for the first batch of a shape."""
        shape = _shape(batch)
        if shape not in self._compiled:
            self._compiled[shape] = self._compile(state, frozen, batch)
        return self._compiled[shape]

    def _compile(self, state: TrainState, frozen: Any, batch: Any) -> Callable[..., Any]:
        trainer, number = self._trainer, len(self) + 1
        trainer.notify("on_compile", trainer.describe_shape(batch), number)
        began = time.perf_counter()
        compiled = self._step.lower(state, frozen, batch).compile()
        release_freed_memory()
        seconds, needed = time.perf_counter() - began, planned_bytes(compiled)
        self.seconds += seconds
        self.planned_bytes = max(self.planned_bytes, needed)
        trainer.notify("on_compiled", number, seconds, needed / 1e9)
        return compiled


def planned_bytes(compiled: Any) -> int:
    """Return the peak memory of a compiled function on one device, or on all CPU devices.

    Arguments, results, and temporaries are counted; 0 if the platform does not report them.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    each = memory.argument_size_in_bytes + memory.temp_size_in_bytes + own
    # CPU devices are the cores of one machine, and share its memory.
    if jax.default_backend() != "cpu":
        return each
    used = set[Any]().union(*(x.device_set for x in jax.tree.leaves(compiled.input_shardings)))
    return each * sum(device.process_index == jax.process_index() for device in used)


def _shape(batch: Any) -> tuple[Any, ...]:
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, tuple((jnp.shape(x), getattr(x, "dtype", type(x))) for x in leaves)
