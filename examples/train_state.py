"""Fine-tune a Flax Linen model with `TrainState`, stop, and go on from an Orbax checkpoint.

    python examples/train_state.py
    python examples/train_state.py --steps 100 --rank 16 --out my_run

The model is the pre-trained Llama that comes with the package; any Linen module does. A row is a
passage of random tokens, twice, and the loss is that of the second time: the base is poor at
repeating, and the adapter learns it. 20 seconds on two CPU cores.

What is new in a training script are the three arguments of `TrainState.create`; the step is as for
any model. At half time the adapter is saved by itself, and what only resuming needs beside it:

    my_run/adapter/      the adapter's leaves, and the fingerprint of their base: to be handed on
    my_run/training/     the step, and the optimizer's state, which has leaves for the adapter alone

The second half is run twice, straight on and from these files, and ends in the same bits.
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

ROWS, PASSAGE = 8, 16  # of a batch; tokens that come twice


def batch(number: int) -> np.ndarray:
    """Draw rows (rows, tokens) by the batch's number, so that a resumed run gets the right ones."""
    passage = np.random.default_rng(number).integers(300, 4096, (ROWS, PASSAGE), np.int32)
    return np.concatenate([passage, passage], axis=1)


def loss(params: Any, state: TrainState, tokens: jax.Array) -> jax.Array:
    """Cross entropy of the second passage."""
    logits = state.apply_fn(params, tokens[:, :-1])[:, PASSAGE - 1 :]  # (rows, passage, vocabulary)
    target = tokens[:, PASSAGE:]  # (rows, passage)
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


# The state is donated: its memory is used again, so that there is one copy of the base, not two.
@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, tokens: jax.Array) -> TrainState:
    """One step of the optimizer; nothing here is about LoRA."""
    return state.apply_gradients(grads=jax.grad(loss)(state.params, state, tokens))


def train(state: TrainState, until: int) -> TrainState:
    """Train from the state's own step on."""
    for step in range(int(state.step), until):
        state = train_step(state, batch(step))
    return state


def save(folder: Path, state: TrainState) -> None:
    """Save the adapter by itself, and beside it what only resuming needs."""
    base, adapter = jl.partition(state.params)
    jl.save_adapter(folder / "adapter", adapter, base=base)
    with ocp.StandardCheckpointer() as checkpointer:
        rest = {"step": state.step, "opt_state": state.opt_state}
        checkpointer.save(folder.absolute() / "training", rest)


def resume(folder: Path, base: Any, create: Callable[[Any], TrainState]) -> TrainState:
    """Go on where `save` was called, from the base as it was loaded."""
    adapter = jl.load_adapter(folder / "adapter", base=base)  # refuses every other base
    state = create(jl.combine(base, adapter))
    with ocp.StandardCheckpointer() as checkpointer:
        like = {"step": state.step, "opt_state": state.opt_state}
        rest = checkpointer.restore(folder.absolute() / "training", like)
    return state.replace(**rest)


def same_bits(one: Any, other: Any) -> bool:
    """Tell whether two trees hold the same bytes."""
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), one, other)
    return all(jax.tree.leaves(same))


def megabytes(folder: Path) -> float:
    """Size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def run(folder: Path, steps: int, rank: int) -> tuple[tuple[float, ...], bool, bool]:
    """Give the losses before, at half time and after; whether the base and the resumed run hold."""
    model, params = jl.models.load(model_path(), dtype="float32")
    variables, unseen = {"params": params}, jnp.asarray(batch(steps))
    kernels = jl.find_kernels(model.apply, variables, unseen)
    adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=rank), kernels=kernels)
    apply_fn = jl.lora_apply(model.apply)
    tx = jl.masked_optimizer(optax.adamw(3e-3))  # optax.masked, with jl.trainable_mask

    def create(params: Any) -> TrainState:
        state = TrainState.create(apply_fn=apply_fn, params=params, tx=tx)
        # An array too, and all put on one device: resumed or not, the step is compiled once.
        return jax.device_put(state.replace(step=jnp.zeros((), jnp.int32)), jax.devices()[0])

    state = create(jl.combine(variables, adapter))
    summary = jl.summary(variables, adapter)
    print(f"{summary.trainable:,} of {summary.total:,} parameters are trained")

    measure = jax.jit(lambda state: loss(state.params, state, unseen))
    before = float(measure(state))
    state = train(state, steps // 2)
    half = float(measure(state))
    save(folder, state)
    straight = train(state, steps)
    after = float(measure(straight))
    print(f"loss of unseen rows: {before:.3f} before, {half:.3f} at half time, {after:.3f} after")

    base = {"params": jl.models.load(model_path(), dtype="float32")[1]}  # as a new process would
    unchanged = same_bits(jl.partition(straight.params)[0], base)
    print(f"the base is bitwise what its file holds: {unchanged}")
    resumed = same_bits(train(resume(folder, base, create), steps), straight)
    print(f"the resumed run ends in the same bits:   {resumed}")
    sizes = [f"{name} {megabytes(folder / name):.2f} MB" for name in ("adapter", "training")]
    print(f"on disk: {', '.join(sizes)}; the base has {summary.base_bytes / 1e6:.2f} MB")
    return (before, half, after), unchanged, resumed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a folder that is in use is a message and no traceback."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, help="folder to keep the checkpoint in")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(options.out or Path(folder), options.steps, options.rank)
        except jl.errors.LoraError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
