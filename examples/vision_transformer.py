"""Adapt a vision Transformer to new classes: LoRA in its layers, and a new, fully trained head.

    python examples/vision_transformer.py
    python examples/vision_transformer.py --steps 300 --rank 8

The images are noisy bars, generated with NumPy. The base model classifies bright bars by four
directions; the adapter learns dark bars in eight directions. This needs a new head, which
`modules_to_save` trains fully, beside LoRA on all other dense kernels. For comparison, the head is
also trained alone, with the same steps and learning rate. The example takes about 20 seconds on two
CPU cores.
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

SIDE, PATCH, WIDTH, BATCH_SIZE = 24, 6, 32, 64  # SIDE and PATCH in pixels


# --- the model, without LoRA ---------------------------------------------------------------------


class Layer(nn.Module):
    """A pre-norm Transformer layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, patches + 1, width) to the same shape."""
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden)


class VisionTransformer(nn.Module):
    """A small ViT (Dosovitskiy et al., arXiv:2010.11929)."""

    classes: int
    layers: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, side, side, 1) to scores (batch, classes)."""
        small = nn.initializers.normal(0.02)
        patches = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), name="patches")(images)
        x = patches.reshape(len(images), -1, WIDTH)  # (batch, patches, width)
        token = self.param("class_token", small, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, WIDTH)), x], axis=1)
        x = x + self.param("positions", small, (1, *x.shape[1:]))  # (batch, patches + 1, width)
        for number in range(self.layers):
            x = Layer(name=f"layer_{number}")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x)[:, 0])  # (batch, classes)


# --- images and training -------------------------------------------------------------------------


def bars(
    number: int, classes: int, dark: bool, size: int = BATCH_SIZE
) -> tuple[jax.Array, jax.Array]:
    """Draw batch `number`: images (batch, side, side, 1) and their classes (batch,)."""
    rng = np.random.default_rng(number)
    direction = rng.integers(0, classes, size, np.int32)
    angle = (np.pi * direction / classes)[:, None, None]
    middle = rng.uniform(-4, 4, (2, size, 1, 1))
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2  # (side, side) each
    x, y = x - middle[0], y - middle[1]  # (batch, side, side)
    along = np.abs(x * np.cos(angle) + y * np.sin(angle)) < 8
    across = np.abs(x * np.sin(angle) - y * np.cos(angle)) < 1.5
    images = ((along & across) != dark) + rng.normal(0, 0.2, along.shape)
    return jnp.asarray(images[..., None], jnp.float32), jnp.asarray(direction)


def train(score: Callable[..., Any], trained: Any, frozen: Any, task: Any, steps: int) -> Any:
    """Minimize the cross-entropy of score(trained, frozen, images) with respect to `trained`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, max(steps, 1)))

    @jax.jit
    def step(trained: Any, state: Any, frozen: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss(trained: Any) -> jax.Array:
            scores = score(trained, frozen, x)  # (batch, classes)
            return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(trained), state)
        return optax.apply_updates(trained, updates), state

    state = optimizer.init(trained)
    for number in range(steps):
        trained, state = step(trained, state, frozen, *task(number))
    return trained


# --- LoRA ----------------------------------------------------------------------------------------


def run(steps: int, rank: int, pretraining: int, layers: int) -> tuple[float, float, float]:
    """Return the accuracies on unseen images: before, with the head only, and with LoRA."""
    old, task = VisionTransformer(4, layers), functools.partial(bars, classes=4, dark=False)
    base = jax.jit(old.init)(jax.random.key(0), task(0)[0])
    base = train(lambda base, _, x: old.apply(base, x), base, None, task, pretraining)

    model, task = VisionTransformer(8, layers), functools.partial(bars, classes=8, dark=True)
    unseen, classes = task(10**6, size=1000)
    head = nn.Dense(8).init(jax.random.key(1), jnp.zeros((1, WIDTH)))["params"]
    variables = {"params": {**base["params"], "head": head}}
    kernels = jl.find_kernels(model.apply, variables, unseen)
    config = jl.LoraConfig(rank=rank, modules_to_save=("head",))
    adapter = jl.lora_init(jax.random.key(2), variables, config, kernels=kernels)
    print(jl.summary(variables, adapter))

    @jax.jit
    def score(adapter: jl.Adapter, variables: Any, images: jax.Array) -> jax.Array:
        return jl.lora_apply(model.apply)(jl.combine(variables, adapter), images)

    def score_of_head(head: Any, frozen: Any, images: jax.Array) -> jax.Array:
        adapter, variables = frozen  # the LoRA update stays zero
        return score(dataclasses.replace(adapter, whole=head), variables, images)

    def accuracy(adapter: jl.Adapter) -> float:
        scores = score(adapter, variables, unseen)  # (batch, classes)
        return float(jnp.mean(scores.argmax(-1) == classes))

    head = train(score_of_head, adapter.whole, (adapter, variables), task, steps)
    head_alone = accuracy(dataclasses.replace(adapter, whole=head))
    before, after = accuracy(adapter), accuracy(train(score, adapter, variables, task, steps))
    print(f"accuracy before, with a random head:   {before:.3f}")
    print(f"accuracy with the head trained only:   {head_alone:.3f}")
    print(f"accuracy with LoRA and the head:       {after:.3f}")
    return before, head_alone, after


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="training steps of each adapter")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument(
        "--pretraining", type=int, default=150, help="training steps of the base model"
    )
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args(argv)
    run(options.steps, options.rank, options.pretraining, options.layers)


if __name__ == "__main__":
    main()
