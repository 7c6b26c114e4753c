"""The step, compiled once a shape: how many programs a run has, and what they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

from jax_lora.data.batches import Batch
from jax_lora.finetune.step import TrainState
from jax_lora.report.events import Reporter


class Programs:
    """Compiles a step for every shape of batch that comes.

    Args:
      step: The jitted step.
      reporter: Is told what is being compiled, and what it took.
    """

    def __init__(self, step: Any, reporter: Reporter):
        """Begin with none."""
        self._step, self._reporter = step, reporter
        self._compiled: dict[tuple[int, ...], Callable[..., Any]] = {}
        self.seconds = 0.0
        self.planned_bytes = 0

    def __len__(self) -> int:
        """Count the programs."""
        return len(self._compiled)

    def of(self, state: TrainState, frozen: Any, batch: Batch) -> Callable[..., Any]:
        """Return the program for a batch; compile it if it is the first of its shape."""
        shape = (*batch.ids.shape, *batch.at.shape)
        if shape not in self._compiled:
            kind = "packed rows of" if batch.segments is not None else "rows of up to"
            self._reporter.compiling(f"{kind} {batch.ids.shape[1]} tokens", len(self) + 1)
            began = time.perf_counter()
            compiled = self._step.lower(state, frozen, batch).compile()
            seconds, needed = time.perf_counter() - began, planned_bytes(compiled)
            self.seconds += seconds
            self.planned_bytes = max(self.planned_bytes, needed)
            self._compiled[shape] = compiled
            self._reporter.compiled(len(self), seconds, needed / 1e9)
        return self._compiled[shape]


def planned_bytes(compiled: Any) -> int:
    """Read from a compiled program what it needs at once, on all devices that share a memory.

    Args:
      compiled: From `jitted.lower(...).compile()`.

    Returns:
      Bytes of arguments, results and scratch; 0 where the platform does not say.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    each = memory.argument_size_in_bytes + memory.temp_size_in_bytes + own
    # The devices of a CPU are its cores: their copies lie in one memory.
    on_cpu = jax.default_backend() == "cpu"
    return each * (len(_devices(compiled)) if on_cpu else 1)


def _devices(compiled: Any) -> set[Any]:
    shardings = jax.tree.leaves(compiled.input_shardings)
    return {device for sharding in shardings for device in sharding.device_set}
