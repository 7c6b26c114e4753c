"""Train and save without end, until killed: a run in `FOLDER/run`, an adapter in `FOLDER/adapter`.

Prints the step and a digest of the adapter of every checkpoint.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import jax_lora as jl
from jax_lora.finetune.callbacks import Callback, Checkpoint
from jax_lora.finetune.trainer import Trainer
from jax_lora.storage.json_files import digest

BASE = {"kernel": jnp.arange(256.0).reshape(16, 16) / 256}
BATCHES = [jnp.full((2, 16), 1.0 + i) / 8 for i in range(7)]


def loss_fn(variables, batch):
    return jnp.sum((batch @ variables["kernel"]) ** 2), jnp.float32(batch.shape[0])


def adapter_digest(folder):
    """Hash the digests of the leaves of a saved adapter."""
    return digest(json.loads((folder / "adapter.json").read_text())["pairs"])


class Save(Callback):
    """Saves the adapter beside the run, and reports checkpoints."""

    def __init__(self, folder):
        self.folder = folder

    def on_save(self, trainer, checkpoint):
        jl.save_adapter(self.folder, trainer.adapter, base=BASE, overwrite=True)
        print(trainer.step, adapter_digest(checkpoint), flush=True)


def main(folder):
    start = jl.lora_init(jax.random.key(0), BASE, jl.LoraConfig(rank=4))
    trainer = Trainer(
        loss_fn,
        BASE,
        start,
        optax.adam(1e-3),
        BATCHES,
        steps=10**6,
        run=folder / "run",
        resume="auto",
        callbacks=[Checkpoint(1), Save(folder / "adapter")],
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
