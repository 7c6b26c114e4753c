"""Time the training step of published shapes with random weights, on the present device."""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.profile_step import durations
from benchmarks.recorder import Recorder
from jax_lora.data.collators import Batch
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.step import init_state
from jax_lora.init import lora_init
from jax_lora.plan.accelerators import ACCELERATORS, Accelerator
from jax_lora.plan.compiled_step import memory_of, optimizer_of, trace_step
from jax_lora.plan.matmul_flops import matmul_flops
from jax_lora.plan.planned_model import PlannedModel, plan_config, plan_shape
from jax_lora.plan.target_plan import attention_flops
from jax_lora.transform.strategies import target_platform

# The allocator reports the peak since the process began, which is that of the first row only.
ROWS: dict[str, dict[str, Any]] = {
    "LoRA, auto": {},
    "LoRA, full": {"remat": "full"},
    "LoRA, auto, packed": {"pack": True},
    "full fine-tuning, full": {"fine_tune_type": "full", "remat": "full"},
}
PROFILED = "LoRA, auto"
# A rehearsal runs one row of each model, as compilation dominates its time.
REHEARSED = {"llama-3.2-1b": PROFILED, "llama-3-8b": "full fine-tuning, full"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model with its batch.

    Args:
      model: The shapes of the model.
      examples: Examples in a batch.
      length: Sequence length.
    """

    model: PlannedModel
    examples: int
    length: int


def shape_of(name: str, rehearse: bool) -> Shape:
    """Look up a published model and choose its batch; a toy for a rehearsal."""
    model = plan_shape(name, None)
    if not rehearse:
        return Shape(model, *((1, 4096) if name == "llama-3-8b" else (4, 4096)))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    config = dataclasses.replace(model.module.config, **sizes, **heads, head_dim=16)
    return Shape(plan_config(config, jnp.bfloat16, name), 1, 32)


def accelerator_of(kind: str) -> Accelerator | None:
    """Find the figures of a device by JAX's `device_kind`.

    Example:
      >>> accelerator_of("NVIDIA H100 80GB HBM3").flops
      989000000000000.0
      >>> accelerator_of("TPU v5 lite") is ACCELERATORS["v5e"]
      True
    """
    text = kind.lower().replace(" lite", "e").replace("rtx ", "rtx")
    text = {"tpu v5": "tpu v5p"}.get(text, text)
    found = [name for name in ACCELERATORS if re.search(rf"\b{name}\b", text)]
    return ACCELERATORS[found[0]] if found else None


def time_steps(recorder: Recorder, name: str, rehearse: bool) -> None:
    """Record each row of a model, and a profile of one of them."""
    shape = shape_of(name, rehearse)
    for row, changes in ROWS.items():
        if rehearse and row != REHEARSED[name]:
            continue
        settings = TrainSettings(
            batch_size=shape.examples, max_seq_length=shape.length, rank=16, **changes
        )
        runs: list[Run] = []  # emptied before the next row, which needs the memory
        recorder.run("step", f"{name}, {row}", functools.partial(_row, shape, settings, runs))
        if runs and row == PROFILED:
            recorder.run("profile", name, runs[0].profile)


def _row(shape: Shape, settings: TrainSettings, runs: list[Run]) -> dict[str, Any]:
    device = jax.devices()[0]
    run = Run(shape, settings)
    found: dict[str, Any] = {
        "remat": run.remat,
        "tokens": shape.examples * shape.length,
        "compile_seconds": run.seconds,
        "peak_bytes": run.peak,
    }
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is not None and run.peak > limit:
        return found | {"error": f"does not fit: {run.peak / 1e9:.1f} of {limit / 1e9:.1f} GB"}
    run.start()
    runs.append(run)
    seconds = statistics.median(run.step() for _ in range(8))
    flops, figures = run.model_flops(), accelerator_of(device.device_kind)
    return found | {
        "step_seconds": seconds,
        "tokens_per_second": found["tokens"] / seconds,
        "model_flops": flops,
        "mfu": None if figures is None else flops / seconds / figures.flops,
        "allocator_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "loss": run.loss,
        "right": bool(np.isfinite(run.loss)),
    }


class Run:
    """A compiled step and its arguments.

    Args:
      shape: The model and its batch.
      settings: Settings of the run.
    """

    def __init__(self, shape: Shape, settings: TrainSettings):
        """Compile the step, with full rematerialization if it does not fit otherwise."""
        self._shape, self._settings = shape, settings
        self.remat = settings.remat_on(target_platform(()))
        self._compile()
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", self.peak)
        if settings.remat == "auto" and self.peak > limit:
            self.remat = "full"
            self._compile()

    def _trace(self, remat: str) -> Any:
        length = self._shape.length
        return trace_step(
            self._shape.model, self._settings, length=length, targets=length, remat=remat
        )[0]

    def _compile(self) -> None:
        began = time.perf_counter()
        self.compiled = self._trace(self.remat).lower().compile()
        self.seconds = time.perf_counter() - began
        memory = memory_of(self.compiled)
        self.peak = 0 if memory is None else memory.peak

    def start(self) -> None:
        """Create the arguments on the device, and run two steps."""
        model, settings = self._shape.model, self._settings
        weights = random_weights(model.variables)
        if settings.fine_tune_type == "full":
            self._frozen, trainable = {}, weights
        else:
            config = settings.lora_config()
            self._frozen = weights
            trainable = lora_init(jax.random.key(1), weights, config, kernels=model.kernels)
        state = init_state(trainable, optimizer_of(settings), in_place=True)
        shardings, _ = self.compiled.input_shardings
        arguments = state, self._frozen, random_batch(self._shape, settings)
        self._state, self._frozen, self._batch = jax.device_put(arguments, shardings)
        del state, trainable, weights, arguments
        self.step()
        self.step()

    def step(self) -> float:
        """Run one step and return its time in seconds."""
        began = time.perf_counter()
        self._state, report = self.compiled(self._state, self._frozen, self._batch)
        self.loss = float(report.loss)
        jax.block_until_ready(self._state)
        return time.perf_counter() - began

    def profile(self) -> dict[str, Any]:
        """Sum the milliseconds of each kind of operation in a step."""
        steps = 3
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(steps):
                    self.step()
            microseconds = durations(Path(folder))
        total: dict[str, float] = defaultdict(float)
        for operation, each in microseconds.items():
            kind = re.sub(r"[.\d]+$", "", operation)
            if kind not in ("while", "call", "conditional"):  # they contain others
                total[kind] += each / 1e3 / steps
        longest = sorted(total.items(), key=lambda item: -item[1])[:20]
        return {"milliseconds": dict(longest), "all": sum(total.values())}

    def model_flops(self) -> float:
        """Count the FLOPs that the step needs, without recomputation."""
        tokens, length = self._shape.examples * self._shape.length, self._shape.length
        flops = matmul_flops(self._trace("none").jaxpr.jaxpr)
        fused = target_platform(()) != "cpu"  # a fused kernel's matmuls are not in the jaxpr
        extra = attention_flops(self._shape.model, tokens, length, "none") if fused else 0.0
        return flops + extra


def random_weights(shapes: Any) -> Any:
    """Draw weights on the device, one array at a time."""
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    return jax.tree.map(lambda leaf: _draw(next(keys), leaf.shape, leaf.dtype), shapes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if len(shape) == 1 or (len(shape) == 2 and shape[0] < 128):  # norms
        return jnp.ones(shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)


def random_batch(shape: Shape, settings: TrainSettings) -> Batch:
    """Draw token ids; a packed sequence consists of four segments."""
    rng = np.random.default_rng(0)
    size = (shape.examples, shape.length)
    ids, labels = rng.integers(0, shape.model.shape.vocab_size, (2, *size), np.int32)
    place = np.broadcast_to(np.arange(shape.length, dtype=np.int32), size)
    part = -(-shape.length // 4)
    return Batch(
        ids=ids,
        at=place,
        labels=labels,
        weights=np.ones(size, np.float32),
        positions=place % part if settings.pack else None,
        segments=place // part if settings.pack else None,
    )
