"""Adapt an unmodified Flax NNX model, and put the result back into the module.

    python examples/nnx_model.py
    python examples/nnx_model.py --steps 400 --rank 8

The model forecasts the next value of a series. It is trained on sine waves as any NNX model is, and
then adapted to waves that climb. 15 seconds on two CPU cores.

`lora_apply` wants a pure function, and NNX gives one: `nnx.split` takes the parameters out of the
module, the function merges them in again and calls it. The step differentiates the adapter alone,
so a plain Optax optimizer does, without a mask. In the end there are ordinary modules again: a new
one by `nnx.merge`, beside the base, or the old one by `nnx.update`, in the base's place.
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

ROWS, TIME, WIDTH = 16, 48, 32


# --- the model and its data, which know nothing of LoRA ------------------------------------------


class Forecaster(nnx.Module):
    """Forecast the next value at every point of a series, from the points until then."""

    def __init__(self, rngs: nnx.Rngs):
        """Make the layers."""
        self.embed = nnx.Linear(2, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, series: jax.Array) -> jax.Array:
        """Map series (rows, time) to forecasts (rows, time)."""
        clock = jnp.broadcast_to(jnp.arange(series.shape[1]) / TIME, series.shape)
        x = self.embed(jnp.stack([series, clock], axis=-1))  # (rows, time, width)
        x = x + self.attention(x, mask=nnx.make_causal_mask(series))
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.head(x)[..., 0]  # (rows, time)


def sines(number: int) -> jax.Array:
    """Draw a batch of sine waves (rows, time) by its number."""
    rng = np.random.default_rng(number)
    length, phase = rng.uniform(8, 24, (ROWS, 1)), rng.uniform(0, 1, (ROWS, 1))
    return jnp.asarray(np.sin(2 * np.pi * (np.arange(TIME) / length + phase)), jnp.float32)


def climbing(number: int) -> jax.Array:
    """Draw a batch of waves of half the height on a rising line: (rows, time)."""
    return sines(number) / 2 + jnp.linspace(0, 2, TIME)[None]


def error(forecasts: jax.Array, series: jax.Array) -> jax.Array:
    """Mean square error of the forecasts made at all points but the last."""
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
    """Train an adapter of forecast(params, rest, series) on waves that climb."""
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
    """Give the errors before and after, how far merged is from factored, if the base is intact."""
    model = nnx.jit(Forecaster)(nnx.Rngs(0))
    pretrain(model, pretraining)
    graph, params, rest = nnx.split(model, nnx.Param, ...)  # rest: statistics, random keys

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
    print(f"error on waves that climb: {before:.4f} before, {after:.4f} after")
    distance = float(jnp.max(jnp.abs(adapted - factored)))
    print(f"merged and factored forecasts differ by {distance:.1e} at most")
    print(f"training left the base bitwise as it was: {intact}")

    nnx.update(model, merged)  # or the old one; `params` are its own variables, and change too
    same = bool(jnp.array_equal(call(model, unseen), adapted))
    print(f"the updated module forecasts as the new one, bit by bit: {same}")
    return before, after, distance, intact


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="steps of the adapter")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--pretraining", type=int, default=200, help="steps on sine waves")
    options = parser.parse_args(argv)
    run(options.steps, options.rank, options.pretraining)


if __name__ == "__main__":
    main()
