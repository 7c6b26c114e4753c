"""Train and save without end, until killed: a run in `FOLDER/run`, an adapter in `FOLDER/adapter`.

Reports the step and a digest of the adapter of every checkpoint.
"""

import json
import os
import signal

import grain.experimental  # noqa: F401  so that a fork has it, like Orbax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401

import jax_lora as jl
from jax_lora.finetune.callbacks import Callback, Checkpoint
from jax_lora.finetune.trainer import Trainer
from jax_lora.storage.json_files import json_checksum

BASE = {"kernel": np.arange(256, dtype=np.float32).reshape(16, 16) / 256}
BATCHES = [np.full((2, 16), 1.0 + i, np.float32) / 8 for i in range(7)]


def loss_fn(variables, batch):
    return jnp.sum((batch @ variables["kernel"]) ** 2), jnp.float32(batch.shape[0])


def adapter_digest(folder):
    """Hash the digests of the leaves of a saved adapter."""
    return json_checksum(json.loads((folder / "adapter.json").read_text())["pairs"])


class Save(Callback):
    """Saves the adapter beside the run, and reports checkpoints."""

    def __init__(self, folder, report):
        self.folder, self.report = folder, report

    def on_save(self, trainer, checkpoint):
        jl.save_adapter(self.folder, trainer.adapter, base=BASE, overwrite=True)
        self.report(f"{trainer.step} {adapter_digest(checkpoint)}")


def save_without_end(report, folder):
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
        callbacks=[Checkpoint(1), Save(folder / "adapter", report)],
    )
    trainer.train()


PEFT_NAMES = {"kernel": "model.proj"}


def peft_adapter(value):
    """An adapter whose factors, rank and scale all depend on a value."""
    a, b = np.full((16, value), value, np.float32), np.full((value, 16), value, np.float32)
    config = jl.LoraConfig(rank=value, alpha=value * value)
    return jl.Adapter({"kernel": jl.LoraPair(a, b, scale=float(value))}, {}, config)


def save_peft(report, folder, value, calls):
    """Save for PEFT, and kill the process before the n-th file is renamed or removed."""
    left = calls

    def killing(call):
        def checked(*args, **named):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **named)

        return checked

    os.rename, os.replace, os.unlink = map(killing, (os.rename, os.replace, os.unlink))
    jl.peft.save(folder, peft_adapter(value), names=PEFT_NAMES)
    report("saved")
