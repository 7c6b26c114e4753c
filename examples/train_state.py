"""Fine-tune a Flax Linen model with `TrainState`, save, and resume from an Orbax checkpoint.

    python examples/train_state.py
    python examples/train_state.py --steps 100 --rank 16 --out my_run

The model is the bundled pre-trained Llama; any Linen module works. Each example is a passage of
random tokens, repeated once, and the loss is that of the repetition. The base model is poor at
copying, and the adapter learns it. The example takes about 20 seconds on two CPU cores.

Compared with ordinary training, only the three arguments of `TrainState.create` differ; the step is
the same. Halfway, two folders are saved:

    my_run/adapter/      the adapter and the fingerprint of its base model, to share
    my_run/training/     the step and the optimizer state (of the adapter only), to resume

The second half runs twice, once without interruption and once from these files. Both end with
bitwise equal parameters.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

import jax_lora as jl
from jax_lora.bundled import model_path

BATCH_SIZE, PASSAGE = 8, 16  # PASSAGE: tokens that are repeated


def batch(number: int) -> np.ndarray:
    """Draw batch `number`, (batch, tokens), which depends on nothing else, as resuming needs."""
    passage = np.random.default_rng(number).integers(300, 4096, (BATCH_SIZE, PASSAGE), np.int32)
    return np.concatenate([passage, passage], axis=1)


def loss(params: Any, state: TrainState, tokens: jax.Array) -> jax.Array:
    """Return the cross-entropy of the repetition."""
    logits = state.apply_fn(params, tokens[:, :-1])[
        :, PASSAGE - 1 :
    ]  # (batch, passage, vocabulary)
    target = tokens[:, PASSAGE:]  # (batch, passage)
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


# Donating the state reuses its memory, so that there are not two copies of the base weights.
@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, tokens: jax.Array) -> TrainState:
    """Run one training step, exactly as without LoRA."""
    return state.apply_gradients(grads=jax.grad(loss)(state.params, state, tokens))


def train(state: TrainState, until: int) -> TrainState:
    """Train from `state.step` on."""
    for step in range(int(state.step), until):
        state = train_step(state, batch(step))
    return state


def save(folder: Path, state: TrainState) -> None:
    """Save the adapter, and the step and optimizer state in a separate folder."""
    base, adapter = jl.partition(state.params)
    jl.save_adapter(folder / "adapter", adapter, base=base)
    with ocp.StandardCheckpointer() as checkpointer:
        rest = {"step": state.step, "opt_state": state.opt_state}
        checkpointer.save(folder.absolute() / "training", rest)


def resume(folder: Path, base: Any, create: Callable[[Any], TrainState]) -> TrainState:
    """Restore the state that `save` saved, given the base model."""
    adapter = jl.load_adapter(folder / "adapter", base=base)  # raises for any other base model
    state = create(jl.combine(base, adapter))
    with ocp.StandardCheckpointer() as checkpointer:
        like = {"step": state.step, "opt_state": state.opt_state}
        rest = checkpointer.restore(folder.absolute() / "training", like)
    return state.replace(**rest)


def same_bits(one: Any, other: Any) -> bool:
    """Return whether two trees are bitwise equal."""
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), one, other)
    return all(jax.tree.leaves(same))


def megabytes(folder: Path) -> float:
    """Return the size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def run(folder: Path, steps: int, rank: int) -> tuple[tuple[float, ...], bool, bool]:
    """Return the losses, whether the base is unchanged, and whether the resumed run is equal."""
    model, params = jl.models.load(model_path(), dtype="float32")
    variables, unseen = {"params": params}, jnp.asarray(batch(steps))
    kernels = jl.find_kernels(model.apply, variables, unseen)
    adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=rank), kernels=kernels)
    apply_fn = jl.lora_apply(model.apply)
    tx = jl.masked_optimizer(optax.adamw(3e-3))  # optax.masked, with jl.trainable_mask

    def create(params: Any) -> TrainState:
        state = TrainState.create(apply_fn=apply_fn, params=params, tx=tx)
        # With the step as an array on the same device, a resumed state does not recompile the step.
        return jax.device_put(state.replace(step=jnp.zeros((), jnp.int32)), jax.devices()[0])

    state = create(jl.combine(variables, adapter))
    summary = jl.summary(variables, adapter)
    print(f"{summary.trainable:,} of {summary.total:,} parameters are trainable")

    measure = jax.jit(lambda state: loss(state.params, state, unseen))
    before = float(measure(state))
    state = train(state, steps // 2)
    half = float(measure(state))
    save(folder, state)
    straight = train(state, steps)
    after = float(measure(straight))
    print(f"loss on unseen examples: {before:.3f} before, {half:.3f} halfway, {after:.3f} after")

    base = {"params": jl.models.load(model_path(), dtype="float32")[1]}  # as in a new process
    unchanged = same_bits(jl.partition(straight.params)[0], base)
    print(f"base parameters are bitwise unchanged:    {unchanged}")
    resumed = same_bits(train(resume(folder, base, create), steps), straight)
    print(f"the resumed run is bitwise the same:      {resumed}")
    sizes = [f"{name} {megabytes(folder / name):.2f} MB" for name in ("adapter", "training")]
    print(f"on disk: {', '.join(sizes)}; base model {summary.base_bytes / 1e6:.2f} MB")
    return (before, half, after), unchanged, resumed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example; errors of the library end it with a message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, help="folder for the checkpoint")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(options.out or Path(folder), options.steps, options.rank)
        except jl.errors.LoraError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
