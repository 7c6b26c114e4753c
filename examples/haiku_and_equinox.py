"""Fine-tune an unmodified Haiku model and an unmodified Equinox model with the same code.

    python examples/haiku_and_equinox.py
    python examples/haiku_and_equinox.py --steps 500 --rank 8

LoRA only needs a function of a pytree: Haiku provides it with `transform`, Equinox with
`partition`. Each model learns which points of a square lie in the lower left or upper right
quarter. Then the data is rotated by 45 degrees, and an adapter learns the new task. The example
takes about 10 seconds on two CPU cores; `pip install -e '.[foreign]'` installs both libraries.

`find_kernels` does not look at names. It traces the function and reports which axis of each leaf is
contracted: the first in Haiku's (in, out) kernels and the last in Equinox's (out, in) kernels.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_lora as jl

WIDTH, BATCH_SIZE = 64, 256
Model = tuple[Callable[[Any, jax.Array], jax.Array], Any]  # function and parameters
Score = Callable[[Any, Any, jax.Array], jax.Array]


# --- two models ----------------------------------------------------------------------------------


def haiku_model() -> Model:
    """Return an MLP in Haiku; `transform` turns it into a function of a dict."""
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([WIDTH, WIDTH, 2])(x)))
    return network.apply, network.init(jax.random.key(0), jnp.zeros((1, 2)))


def equinox_model() -> Model:
    """Return an MLP in Equinox, whose modules are pytrees; `partition` separates their arrays.

    Equinox modules map a single example, so `vmap` adds the batch axis.
    """
    module = eqx.nn.MLP(2, 2, WIDTH, depth=2, key=jax.random.key(0))
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    return lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x), arrays


# --- data and training ---------------------------------------------------------------------------


def points(number: int, degrees: float, size: int = BATCH_SIZE) -> tuple[jax.Array, jax.Array]:
    """Draw batch `number`: points (batch, 2) and their classes (batch,)."""
    drawn = np.random.default_rng(number).uniform(-1, 1, (size, 2))
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    x, y = (drawn @ np.array([[cos, -sin], [sin, cos]])).T  # (batch,) each, rotated
    return jnp.asarray(drawn, jnp.float32), jnp.asarray(x * y > 0, jnp.int32)


def train(score: Score, trained: Any, frozen: Any, degrees: float, steps: int) -> Any:
    """Minimize the cross-entropy of score(trained, frozen, points) with respect to `trained`."""
    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(trained: Any, state: Any, frozen: Any, xy: jax.Array, classes: jax.Array) -> Any:
        def loss(trained: Any) -> jax.Array:
            scores = score(trained, frozen, xy)  # (batch, 2)
            return optax.softmax_cross_entropy_with_integer_labels(scores, classes).mean()

        updates, state = optimizer.update(jax.grad(loss)(trained), state)
        return optax.apply_updates(trained, updates), state

    state = optimizer.init(trained)
    for number in range(steps):
        trained, state = step(trained, state, frozen, *points(number, degrees))
    return trained


def leaf_bytes(tree: Any) -> list[bytes]:
    """Return the bytes of every leaf."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


class Outcome(NamedTuple):
    """The results for one library."""

    before: float  # accuracy of the base model on rotated data
    after: float  # accuracy with the merged adapter
    distance: float  # largest difference between merged and factored scores
    base_unchanged: bool


def describe(kernels: dict[str, jl.Kernel]) -> None:
    """Print the kernels."""
    for path, kernel in kernels.items():
        note = "; the output head, not adapted" if kernel.is_output_head else ""
        axes = f"in {kernel.in_axes}, out {kernel.out_axes}{note}"
        print(f"  {path:20} {kernel.shape!s:9} {kernel.kind}, {axes}")


def fine_tune(model: Model, steps: int, rank: int, pretraining: int) -> Outcome:
    """Pre-train a model, then adapt it to rotated data."""
    fn, params = model
    params = train(lambda params, _, xy: fn(params, xy), params, None, 0, pretraining)
    bits = leaf_bytes(params)

    kernels = jl.find_kernels(fn, params, points(0, 45)[0])
    describe(kernels)
    adapter = jl.lora_init(jax.random.key(1), params, jl.LoraConfig(rank=rank), kernels=kernels)

    def factored(adapter: jl.Adapter, params: Any, xy: jax.Array) -> jax.Array:
        return jl.lora_apply(fn)(jl.combine(params, adapter), xy)

    adapter = train(factored, adapter, params, 45, steps)
    merged = jl.merge(params, adapter)  # parameters for the original function

    xy, classes = points(max(steps, pretraining), 45, size=2000)
    old, new = fn(params, xy), fn(merged, xy)  # (batch, 2)
    return Outcome(
        before=float(jnp.mean(old.argmax(-1) == classes)),
        after=float(jnp.mean(new.argmax(-1) == classes)),
        distance=float(jnp.max(jnp.abs(new - factored(adapter, params, xy)))),
        base_unchanged=leaf_bytes(params) == bits,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps of the adapter")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument(
        "--pretraining", type=int, default=300, help="training steps of the base model"
    )
    options = parser.parse_args(argv)
    for name, model in (("Haiku", haiku_model()), ("Equinox", equinox_model())):
        print(f"{name}: kernels")
        outcome = fine_tune(model, options.steps, options.rank, options.pretraining)
        print(f"  accuracy on rotated data: {outcome.before:.3f} -> {outcome.after:.3f}")
        print(f"  merged and factored scores differ by at most {outcome.distance:.1e}")
        print(f"  base parameters are bitwise unchanged: {outcome.base_unchanged}")


if __name__ == "__main__":
    main()
