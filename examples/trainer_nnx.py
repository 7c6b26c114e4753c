"""Train an adapter for an NNX model of your own with `Trainer`, and put it into the module.

    python examples/trainer_nnx.py

`nnx.split` takes the state out of a module, `nnx.merge` puts it back. Between them a model is a
pure function, as `Trainer` needs it. 15 seconds on two CPU cores.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_lora as jl
from jax_lora.finetune import Report, Trainer

ROWS, TIME, WIDTH = 16, 32, 32


class Forecaster(nnx.Module):
    """A convolutional forecaster of series; it contains nothing of LoRA."""

    def __init__(self, rngs: nnx.Rngs):
        """Make the layers."""
        self.conv = nnx.Conv(1, WIDTH, kernel_size=(9,), padding="CAUSAL", rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, series: jax.Array) -> jax.Array:
        """Map series (rows, time) to forecasts of the next value (rows, time)."""
        x = nnx.gelu(self.conv(series[..., None]))  # (rows, time, width)
        x = x + nnx.gelu(self.hidden(x))
        return self.head(x)[..., 0]  # (rows, time)


def make_batch(step: int, *, rising: bool = False) -> np.ndarray:
    """Draw sine waves (rows, time), on a rising line if asked for."""
    rng = np.random.default_rng(step)
    length, phase = rng.uniform(8, 24, (ROWS, 1)), rng.uniform(0, 1, (ROWS, 1))
    waves = np.sin(2 * np.pi * (np.arange(TIME) / length + phase))
    return (waves / 2 + np.linspace(0, 2, TIME) if rising else waves).astype(np.float32)


def run(options: argparse.Namespace) -> tuple[float, float]:
    """Train the base on waves, and an adapter on rising waves; return losses on the latter."""
    graph, state = nnx.split(Forecaster(nnx.Rngs(0)))

    def loss_fn(state: Any, series: Any) -> tuple[jax.Array, jax.Array]:
        forecasts = nnx.merge(graph, state)(series)
        errors = (forecasts[:, :-1] - series[:, 1:]) ** 2  # (rows, time - 1)
        return errors.sum(), jnp.float32(errors.size)

    pretraining = Trainer(
        loss_fn, state, None, optax.adam(3e-3), make_batch, steps=options.steps, callbacks=[]
    )
    pretraining.train()
    state = jax.tree.map(jnp.array, pretraining.variables)

    forward = lambda state, series: nnx.merge(graph, state)(series)  # noqa: E731
    kernels = jl.find_kernels(forward, state, make_batch(0))
    config = jl.LoraConfig(rank=4, targets=["conv", "hidden", "head"])
    adapter = jl.lora_init(jax.random.key(1), state, config, kernels=kernels)

    rising = lambda step: make_batch(step, rising=True)  # noqa: E731
    held_out = [rising(10_000 + number) for number in range(4)]
    trainer = Trainer(
        loss_fn,
        state,
        adapter,
        optax.adam(3e-3),
        rising,
        steps=options.steps,
        callbacks=[Report(every=100)],
    )
    before = trainer.evaluate(held_out)
    trainer.train()
    after = trainer.evaluate(held_out)
    tuned = nnx.merge(graph, jl.merge(state, trainer.adapter))  # an ordinary module again
    error = float(jnp.mean((tuned(held_out[0])[:, :-1] - held_out[0][:, 1:]) ** 2))
    print(f"loss on rising waves: {before:.4f} before, {after:.4f} after, {error:.4f} merged")
    return before, after


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(parse())
