"""Adapt a vision Transformer to new classes: LoRA in its layers, a new head trained whole.

    python examples/vision_transformer.py
    python examples/vision_transformer.py --steps 300 --rank 8

The pictures are bars in noise, made by NumPy. The base learns four directions of bright bars, the
adapter eight of dark ones. So the head has to be new: `modules_to_save` names it, and it is trained
whole beside the pairs of all other dense kernels. The same head trained alone, as long and at the
same rate, shows what LoRA is for. 20 seconds on two CPU cores.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_lora as jl

SIDE, PATCH, WIDTH, ROWS = 24, 6, 32, 64  # pixels of a picture, of a patch; pictures of a batch


# --- the model, which knows nothing of LoRA -------------------------------------------------------


class Layer(nn.Module):
    """Attention and a perceptron, each added to what came in."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (rows, patches + 1, width) to the same."""
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden)


class VisionTransformer(nn.Module):
    """Dosovitskiy et al. (arXiv:2010.11929), as small as it gets."""

    classes: int
    layers: int

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Map pictures (rows, side, side, 1) to scores (rows, classes)."""
        small = nn.initializers.normal(0.02)
        patches = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), name="patches")(pictures)
        x = patches.reshape(len(pictures), -1, WIDTH)  # (rows, patches, width)
        token = self.param("class_token", small, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, WIDTH)), x], axis=1)
        x = x + self.param("positions", small, (1, *x.shape[1:]))  # (rows, patches + 1, width)
        for number in range(self.layers):
            x = Layer(name=f"layer_{number}")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x)[:, 0])  # (rows, classes)


# --- pictures and training -----------------------------------------------------------------------


def bars(number: int, classes: int, dark: bool, rows: int = ROWS) -> tuple[jax.Array, jax.Array]:
    """Draw bars in noise (rows, side, side, 1) and the classes of their directions (rows,)."""
    rng = np.random.default_rng(number)
    direction = rng.integers(0, classes, rows, np.int32)
    angle = (np.pi * direction / classes)[:, None, None]
    middle = rng.uniform(-4, 4, (2, rows, 1, 1))  # of each bar
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2  # (side, side) each
    x, y = x - middle[0], y - middle[1]  # (rows, side, side)
    along = np.abs(x * np.cos(angle) + y * np.sin(angle)) < 8
    across = np.abs(x * np.sin(angle) - y * np.cos(angle)) < 1.5
    pictures = ((along & across) != dark) + rng.normal(0, 0.2, along.shape)
    return jnp.asarray(pictures[..., None], jnp.float32), jnp.asarray(direction)


def train(score: Callable[..., Any], trained: Any, frozen: Any, task: Any, steps: int) -> Any:
    """Minimise the cross entropy of score(trained, frozen, pictures) by what is trained."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, max(steps, 1)))

    @jax.jit
    def step(trained: Any, state: Any, frozen: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss(trained: Any) -> jax.Array:
            scores = score(trained, frozen, x)  # (rows, classes)
            return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(trained), state)
        return optax.apply_updates(trained, updates), state

    state = optimizer.init(trained)
    for number in range(steps):
        trained, state = step(trained, state, frozen, *task(number))
    return trained


# --- LoRA ----------------------------------------------------------------------------------------


def run(steps: int, rank: int, pretraining: int, layers: int) -> tuple[float, float, float]:
    """Give the accuracies on unseen pictures: before, of the head trained alone, and with LoRA."""
    old, task = VisionTransformer(4, layers), functools.partial(bars, classes=4, dark=False)
    base = jax.jit(old.init)(jax.random.key(0), task(0)[0])
    base = train(lambda base, _, x: old.apply(base, x), base, None, task, pretraining)

    model, task = VisionTransformer(8, layers), functools.partial(bars, classes=8, dark=True)
    unseen, classes = task(10**6, rows=1000)
    head = nn.Dense(8).init(jax.random.key(1), jnp.zeros((1, WIDTH)))["params"]
    variables = {"params": {**base["params"], "head": head}}
    kernels = jl.find_kernels(model.apply, variables, unseen)
    config = jl.LoraConfig(rank=rank, modules_to_save=("head",))
    adapter = jl.lora_init(jax.random.key(2), variables, config, kernels=kernels)
    print(jl.summary(variables, adapter))

    @jax.jit
    def score(adapter: jl.Adapter, variables: Any, pictures: jax.Array) -> jax.Array:
        return jl.lora_apply(model.apply)(jl.combine(variables, adapter), pictures)

    def score_of_head(head: Any, frozen: Any, pictures: jax.Array) -> jax.Array:
        adapter, variables = frozen  # its pairs stay as they are, at zero
        return score(dataclasses.replace(adapter, whole=head), variables, pictures)

    def accuracy(adapter: jl.Adapter) -> float:
        scores = score(adapter, variables, unseen)  # (rows, classes)
        return float(jnp.mean(scores.argmax(-1) == classes))

    head = train(score_of_head, adapter.whole, (adapter, variables), task, steps)
    head_alone = accuracy(dataclasses.replace(adapter, whole=head))
    before, after = accuracy(adapter), accuracy(train(score, adapter, variables, task, steps))
    print(f"accuracy before, with a random head:   {before:.3f}")
    print(f"accuracy with the head trained alone:  {head_alone:.3f}")
    print(f"accuracy with LoRA beside the head:    {after:.3f}")
    return before, head_alone, after


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="steps of each adapter")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--pretraining", type=int, default=150, help="steps of the base")
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args(argv)
    run(options.steps, options.rank, options.pretraining, options.layers)


if __name__ == "__main__":
    main()
