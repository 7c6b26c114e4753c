"""Train an adapter for a Linen model of your own with `Trainer`, stop, and resume.

    python examples/trainer_linen.py
    python examples/trainer_linen.py --run run --steps 400 --resume

The model is a small convolutional classifier of images. `Trainer` needs a loss function
`loss_fn(variables, batch) -> (sum of losses, weight)`, the base variables, an adapter, an
optimizer, and batches. 15 seconds on two CPU cores.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_lora as jl
from jax_lora.finetune import Checkpoint, EarlyStop, Report, Trainer, Validate

SIZE, CLASSES, ROWS = 12, 4, 32


class Classifier(nn.Module):
    """Two convolutions and two dense layers; it contains nothing of LoRA."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (rows, height, width, 1) to logits (rows, classes)."""
        x = nn.gelu(nn.Conv(8, (3, 3), name="conv1")(images))
        x = nn.gelu(nn.Conv(16, (3, 3), strides=2, name="conv2")(x))
        x = nn.gelu(nn.Dense(32, name="hidden")(x.mean(axis=(1, 2))))
        return nn.Dense(CLASSES, name="head")(x)


def make_batch(step: int, *, turned: bool = False) -> dict[str, np.ndarray]:
    """Draw stripes of four directions: a batch is a function of its step, so a run can resume."""
    rng = np.random.default_rng(step)
    labels = rng.integers(CLASSES, size=ROWS)
    angle = np.pi * (labels + 0.5 * turned) / CLASSES
    across, down = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    along = np.cos(angle)[:, None, None] * across + np.sin(angle)[:, None, None] * down
    images = np.sin(1.3 * along + rng.uniform(0, 6, (ROWS, 1, 1)))
    noisy = images + rng.normal(0, 0.3, images.shape)
    return {"images": noisy[..., None].astype(np.float32), "labels": labels.astype(np.int32)}


def run(options: argparse.Namespace) -> tuple[float, float]:
    """Train the base on stripes, and an adapter on turned stripes; return losses on the latter."""
    model = Classifier()
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 1)))

    def loss_fn(variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(variables, batch["images"])  # (rows, classes)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses.sum(), jnp.float32(losses.shape[0])

    # The base: the same Trainer, with all variables trainable.
    pretraining = Trainer(
        loss_fn, variables, None, optax.adam(3e-3), make_batch, steps=300, callbacks=[]
    )
    pretraining.train()
    variables = jax.tree.map(jnp.array, pretraining.variables)

    kernels = jl.find_kernels(model.apply, variables, jnp.zeros((1, SIZE, SIZE, 1)))
    config = jl.LoraConfig(rank=4, targets=["conv1", "conv2", "hidden", "head"], dropout=0.05)
    adapter = jl.lora_init(jax.random.key(1), variables, config, kernels=kernels)

    turned = lambda step: make_batch(step, turned=True)  # noqa: E731
    held_out = [turned(10_000 + number) for number in range(4)]
    trainer = Trainer(
        loss_fn,
        variables,
        adapter,
        optax.adam(3e-3),
        turned,
        steps=options.steps,
        run=options.run,
        resume="auto" if options.resume else False,
        callbacks=[
            Report(every=50),
            Validate(held_out, every=50),
            EarlyStop(patience=5),
            Checkpoint(every=100, keep=2),
        ],
    )
    before = trainer.evaluate(held_out)
    result = trainer.train()
    after = trainer.evaluate(held_out)
    print(f"loss on turned stripes: {before:.3f} before this run, {after:.3f} after it")
    print(f"checkpoint: {result.checkpoint}")
    return before, after


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", help="folder of the run (a temporary one)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="continue the run, if there is one")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the example."""
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        options.run = options.run or f"{scratch}/run"
        run(options)


if __name__ == "__main__":
    main()
