"""Compare the memory that `jax-lora plan` reports with the memory that a step uses.

    python -m benchmarks.plan_accuracy
    python -m benchmarks.plan_accuracy --large    # 1.2 G parameters as well: 6 GB, several minutes

Each case runs in a new process and compares:

* formula and planned: the formulas, and the step compiled from shapes before any weight exists.
* compiled: `memory_analysis` of the step that `train` runs, compiled for real arrays.
* resident: on a CPU, the peak resident memory of the process while arrays are created and three
  steps run, minus the memory after importing and compiling. Linux only. "Again" repeats this in
  the same process, without what the first execution allocates once.

Resident memory is counted by the kernel in pages, so it includes the memory that the allocator
keeps and that Python uses. A GPU would need less.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_lora.bundled import model_path
from jax_lora.finetune.devices import data_mesh, use_all_cores
from jax_lora.finetune.optimizer_factory import make_optimizer
from jax_lora.finetune.schedule import make_schedule
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.step import init_state, make_step
from jax_lora.finetune.tasks import CAUSAL, loss_for
from jax_lora.models import LlamaConfig
from jax_lora.plan.compiled_step import abstract_adapter, abstract_batch, memory_of, trace_step
from jax_lora.plan.methods import estimate
from jax_lora.plan.planned_model import PlannedModel, plan_config, plan_folder, plan_shape
from jax_lora.plan.planning import method_of, step_of
from jax_lora.plan.residuals import trace_residuals

STEPS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a training step."""

    settings: TrainSettings
    length: int
    targets: int
    dtype: str = "float32"

    def model(self) -> PlannedModel:
        """Return the bundled model."""
        return plan_folder(model_path(), self.dtype, "bundled")


class Larger(Case):
    """A Llama with 99 M parameters."""

    def model(self) -> PlannedModel:
        """Return a Llama of the size of GPT-2."""
        config = LlamaConfig(
            vocab_size=16384, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
            num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=1024,
        )  # fmt: skip
        return plan_config(config, self.dtype, "100M")


class Largest(Case):
    """A Llama with 1.2 G parameters."""

    def model(self) -> PlannedModel:
        """Return the shapes of Llama 3.2 1B."""
        return plan_shape("llama-3.2-1b", self.dtype)


CASES = {
    "bundled, 16 x 120": Case(TrainSettings(rank=32, batch_size=16), 120, 40),
    "bundled, 4 parts of 4 x 120": Case(
        TrainSettings(rank=32, batch_size=4, grad_accumulation_steps=4), 120, 40
    ),
    "bundled, 16 x 120, remat": Case(
        TrainSettings(rank=32, batch_size=16, grad_checkpoint=True), 120, 40
    ),
    "100M, 4 x 256": Larger(TrainSettings(rank=32, batch_size=4), 256, 128),
    "100M, 4 x 256, remat": Larger(
        TrainSettings(rank=32, batch_size=4, grad_checkpoint=True), 256, 128
    ),
    "100M, bfloat16, 4 x 256": Larger(TrainSettings(rank=32, batch_size=4), 256, 128, "bfloat16"),
    "100M, bfloat16, 4 x 256, remat": Larger(
        TrainSettings(rank=32, batch_size=4, grad_checkpoint=True), 256, 128, "bfloat16"
    ),
}
LARGE = {
    "1B, bfloat16, 2 x 128": Largest(TrainSettings(batch_size=2), 128, 128, "bfloat16"),
    "1B, bfloat16, 2 x 128, remat": Largest(
        TrainSettings(batch_size=2, grad_checkpoint=True), 128, 128, "bfloat16"
    ),
}


# -----------------------------------------------------------------------------------------------
# In a subprocess
# -----------------------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """Plan a case, then run it.

    Args:
      case: The case.

    Returns:
      Bytes by name, summed over all devices.
    """
    use_all_cores()
    model = case.model()
    traced, devices = trace_step(model, case.settings, length=case.length, targets=case.targets)
    compiled = traced.lower().compile()
    planned = memory_of(compiled, devices)
    make = _makers(model, case)
    first, _ = _resident(compiled, make)
    again, arrays = _resident(compiled, make)
    real = memory_of(_real(model, case, arrays), devices)
    by_formula = estimate(
        method_of(model, case.settings, trace_residuals(model, case.settings)),
        step_of(case.settings, case.length, case.targets, devices),
    )
    if planned is None or real is None:
        raise SystemExit("this backend does not report the memory of compiled functions")
    return {
        "parameters": model.shape.size,
        "devices": devices,
        "formula": by_formula.total * devices,
        "planned": planned.everywhere,
        "compiled": real.everywhere,
        "resident": first,
        "again": again,
    }


def _resident(compiled: Any, make: Any) -> tuple[int, Any]:
    """Create the arguments and run the steps; return peak memory and the arguments."""
    before = _reset_peak()
    state, variables, batch = jax.tree.map(lambda maker: maker(), make)
    for _ in range(STEPS):
        state, report = compiled(state, variables, batch)
        jax.block_until_ready((state, report))
    return _peak() - before, (state, variables, batch)


def _makers(model: PlannedModel, case: Case) -> tuple[Any, Any, Any]:
    """Compile functions that create the arguments on their devices, without copies."""
    adapter = abstract_adapter(model, case.settings)
    state = jax.eval_shape(lambda adapter: init_state(adapter, _optimizer(case)), adapter)
    mesh = data_mesh(case.settings.batch_size, _sizes(model))
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    batch = abstract_batch(case.settings, case.length, case.targets)
    return _fills(state, whole), _fills(model.variables, whole), _fills(batch, rows)


def _fills(tree: Any, sharding: NamedSharding) -> Any:
    def fill(leaf: Any) -> Any:
        value = 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else 1
        make = jax.jit(lambda: jnp.full(leaf.shape, value, leaf.dtype), out_shardings=sharding)
        return make.lower().compile()

    return jax.tree.map(fill, tree)


def _sizes(model: PlannedModel) -> Any:
    """Return arrays that report the right size but use no memory, for `data_mesh`."""
    return jax.tree.map(
        lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), model.variables
    )


def _optimizer(case: Case) -> Any:
    return make_optimizer(make_schedule("cosine", case.settings.learning_rate, 100))


def _real(model: PlannedModel, case: Case, arrays: tuple[Any, Any, Any]) -> Any:
    """Compile the step for real arrays, with a learning rate schedule, as `train` does."""
    step = make_step(
        loss_for(CAUSAL, model.module.clone(remat=case.settings.grad_checkpoint)),
        _optimizer(case),
        accumulation=case.settings.grad_accumulation_steps,
    )
    return step.lower(*arrays).compile()


def _reset_peak() -> int:
    """Return free memory to the system, reset the peak, and return the resident memory."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# -----------------------------------------------------------------------------------------------
# The table
# -----------------------------------------------------------------------------------------------


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", help="measure one case and print JSON", choices=(*CASES, *LARGE))
    parser.add_argument("--large", action="store_true", help="also measure 1.2 G parameters")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure((CASES | LARGE)[options.case])))
        return
    print("| step | devices | formula | planned | compiled | resident | again | planned / again |")
    print("|---|---|---|---|---|---|---|---|")
    for name in (*CASES, *(LARGE if options.large else ())):
        print(_row(name, _in_a_process(name)), flush=True)


def _in_a_process(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--case", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _row(name: str, found: dict[str, Any]) -> str:
    kinds = ("formula", "planned", "compiled", "resident", "again")
    sizes = [f"{found[kind] / 1e6:.0f} MB" for kind in kinds]
    ratio = found["planned"] / found["again"]
    return f"| {name} | {found['devices']} | {' | '.join(sizes)} | {ratio:.3f} |"


if __name__ == "__main__":
    main()
