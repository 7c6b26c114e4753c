"""Adapt an unmodified Flax NNX model, and merge the result back into a module.

    python examples/nnx_model.py
    python examples/nnx_model.py --steps 400 --rank 8

The model forecasts the next value of a series. It is trained on sine waves like any NNX model, and
then adapted to waves with a rising trend. The example takes about 15 seconds on two CPU cores.

`lora_apply` needs a pure function: `nnx.split` separates the parameters from the module, and the
function merges and calls them. The training step differentiates with respect to the adapter only,
so a plain Optax optimizer is enough, without a mask. The result is an ordinary module again, either
a new one by `nnx.merge`, or the same one by `nnx.update`.
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

BATCH_SIZE, TIME, WIDTH = 16, 48, 32


# --- the model and its data, without LoRA --------------------------------------------------------


class Forecaster(nnx.Module):
    """Forecast the next value at every point of a series from the values so far."""

    def __init__(self, rngs: nnx.Rngs):
        """Create the layers."""
        self.embed = nnx.Linear(2, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, series: jax.Array) -> jax.Array:
        """Map series (batch, time) to forecasts (batch, time)."""
        clock = jnp.broadcast_to(jnp.arange(series.shape[1]) / TIME, series.shape)
        x = self.embed(jnp.stack([series, clock], axis=-1))  # (batch, time, width)
        x = x + self.attention(x, mask=nnx.make_causal_mask(series))
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.head(x)[..., 0]  # (batch, time)


def sines(number: int) -> jax.Array:
    """Draw batch `number` of sine waves, (batch, time)."""
    rng = np.random.default_rng(number)
    length, phase = rng.uniform(8, 24, (BATCH_SIZE, 1)), rng.uniform(0, 1, (BATCH_SIZE, 1))
    return jnp.asarray(np.sin(2 * np.pi * (np.arange(TIME) / length + phase)), jnp.float32)


def climbing(number: int) -> jax.Array:
    """Draw batch `number` of sine waves with a rising trend, (batch, time)."""
    return sines(number) / 2 + jnp.linspace(0, 2, TIME)[None]


def error(forecasts: jax.Array, series: jax.Array) -> jax.Array:
    """Return the mean squared error of all forecasts but the last, which has no target."""
    return jnp.mean((forecasts[:, :-1] - series[:, 1:]) ** 2)


def pretrain(model: Forecaster, steps: int) -> None:
    """Train the whole module on sine waves, in place."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Forecaster, optimizer: nnx.Optimizer, series: jax.Array) -> None:
        optimizer.update(model, nnx.grad(lambda model: error(model(series), series))(model))

    for number in range(steps):
        step(model, optimizer, sines(number))


# --- LoRA ----------------------------------------------------------------------------------------


def adapt(forecast: Any, params: nnx.State, rest: nnx.State, steps: int, rank: int) -> jl.Adapter:
    """Train an adapter of forecast(params, rest, series) on waves with a rising trend."""
    kernels = jl.find_kernels(forecast, params, rest, climbing(0))
    adapter: Any = jl.lora_init(
        jax.random.key(0), params, jl.LoraConfig(rank=rank), kernels=kernels
    )
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(adapter: Any, state: Any, params: Any, rest: Any, series: jax.Array) -> Any:
        def loss(adapter: Any) -> jax.Array:
            forecasts = jl.lora_apply(forecast)(jl.combine(params, adapter), rest, series)
            return error(forecasts, series)

        updates, state = optimizer.update(jax.grad(loss)(adapter), state)
        return optax.apply_updates(adapter, updates), state

    state: Any = optimizer.init(adapter)
    for number in range(steps):
        adapter, state = step(adapter, state, params, rest, climbing(number))
    return adapter


def run(steps: int, rank: int, pretraining: int) -> tuple[float, float, float, bool]:
    """Return the errors before and after, the largest merge difference, and base unchanged."""
    model = nnx.jit(Forecaster)(nnx.Rngs(0))
    pretrain(model, pretraining)
    graph, params, rest = nnx.split(model, nnx.Param, ...)  # rest: batch statistics, RNG state

    def forecast(params: nnx.State, rest: nnx.State, series: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, rest, copy=True)(series)

    bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    adapter = adapt(forecast, params, rest, steps, rank)
    intact = bits == [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    print(jl.summary(params, adapter))

    unseen = climbing(steps)
    factored = jax.jit(jl.lora_apply(forecast))(jl.combine(params, adapter), rest, unseen)
    call = nnx.jit(lambda module, series: module(series))
    merged = jl.merge(params, adapter)
    adapted = call(nnx.merge(graph, merged, rest, copy=True), unseen)  # a new module
    before, after = float(error(call(model, unseen), unseen)), float(error(adapted, unseen))
    print(f"error on waves with a rising trend: {before:.4f} before, {after:.4f} after")
    distance = float(jnp.max(jnp.abs(adapted - factored)))
    print(f"merged and factored forecasts differ by at most {distance:.1e}")
    print(f"base parameters are bitwise unchanged: {intact}")

    nnx.update(
        model, merged
    )  # or update the module; `params` are its variables, so they change too
    same = bool(jnp.array_equal(call(model, unseen), adapted))
    print(f"the updated module is bitwise equal to the new one: {same}")
    return before, after, distance, intact


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="training steps of the adapter")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument(
        "--pretraining", type=int, default=200, help="training steps of the base model"
    )
    options = parser.parse_args(argv)
    run(options.steps, options.rank, options.pretraining)


if __name__ == "__main__":
    main()
