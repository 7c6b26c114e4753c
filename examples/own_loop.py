"""Train an adapter in a loop of your own, with checkpoints of Orbax's `CheckpointManager`.

    python examples/own_loop.py

`make_step` makes the jitted step; the loop, the batches, and the checkpoints are yours. The state
(adapter, optimizer state, step) is a pytree of arrays, which Orbax saves without conversion. The
loop stops half way and resumes: it ends in the same bits as one without a stop. 10 seconds on two
CPU cores.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jax_lora as jl
from jax_lora.finetune import TrainState, init_state, make_step

INPUTS, HIDDEN, ROWS = 16, 64, 32


def model(variables: Any, x: jax.Array) -> jax.Array:
    """Map (rows, inputs) to (rows, 1)."""
    return jnp.tanh(x @ variables["up"]) @ variables["down"]


def loss_fn(variables: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the sum of squared errors, and the number of rows."""
    x, y = batch
    return jnp.sum((model(variables, x) - y) ** 2), jnp.float32(x.shape[0])


def make_batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the batch of a step: the same batch for the same step, so the loop can resume."""
    x = np.random.default_rng(step).normal(size=(ROWS, INPUTS)).astype(np.float32)
    return x, np.sin(x.sum(axis=1, keepdims=True))


def train(
    step: Any, variables: Any, state: TrainState, folder: Path, until: int
) -> tuple[TrainState, float]:
    """Resume from the latest checkpoint, train to step `until`, and save every 50 steps."""
    loss = float("nan")
    with ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as saved:
        latest = saved.latest_step()
        if latest is not None:
            state = saved.restore(latest, args=ocp.args.StandardRestore(state))
        for number in range(int(state.step), until):
            state, report = step(state, variables, make_batch(number))
            loss = float(report.loss)
            if (number + 1) % 50 == 0:
                saved.save(number + 1, args=ocp.args.StandardSave(state))
        saved.wait_until_finished()
    return state, loss


def run(options: argparse.Namespace, scratch: Path) -> tuple[TrainState, TrainState]:
    """Train once without a stop and once with one; return both states."""
    draw = np.random.default_rng(0)
    variables = {
        "up": jnp.asarray(draw.normal(size=(INPUTS, HIDDEN)) / 4, jnp.float32),
        "down": jnp.asarray(draw.normal(size=(HIDDEN, 1)) / 8, jnp.float32),
    }
    kernels = jl.find_kernels(model, variables, make_batch(0)[0])
    config = jl.LoraConfig(rank=8, targets=["up", "down"])
    adapter = jl.lora_init(jax.random.key(0), variables, config, kernels=kernels)
    optimizer = optax.adam(3e-3)
    step = make_step(loss_fn, optimizer)

    fresh = lambda: init_state(adapter, optimizer)  # noqa: E731
    whole, loss = train(step, variables, fresh(), scratch / "whole", options.steps)
    print(f"without a stop: loss {loss:.4f} at step {int(whole.step)}")
    train(step, variables, fresh(), scratch / "parts", options.steps // 2)
    parts, loss = train(step, variables, fresh(), scratch / "parts", options.steps)
    print(f"with a stop:    loss {loss:.4f} at step {int(parts.step)}")

    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), whole.trainable, parts.trainable)
    print(f"the same bits: {all(jax.tree.leaves(same))}")
    jl.save_adapter(scratch / "adapter", parts.trainable, base=variables)  # without training state
    return whole, parts


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    return parser.parse_args(arguments)


def main() -> None:
    """Run the example."""
    with tempfile.TemporaryDirectory() as scratch:
        run(parse(), Path(scratch))


if __name__ == "__main__":
    main()
