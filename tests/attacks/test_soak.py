"""A long run needs no more memory, files, threads or compilations than a short one.

`JAX_LORA_SOAK_STEPS` sets the number of steps; the default keeps the suite short.
"""

import gc
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.finetune.callbacks import Callback, Checkpoint, Report, Validate
from jax_lora.finetune.trainer import Trainer
from jax_lora.report.metrics import MetricsLog
from jax_lora.report.plain_reporter import PlainReporter

STEPS = int(os.environ.get("JAX_LORA_SOAK_STEPS", "300"))
# By how much a sample may exceed that of a third of the run: pools of threads fill up late.
SLACK = {"memory": 24 * 2**20, "threads": 4, "files": 2}


def loss_fn(variables, batch):
    hidden = jnp.tanh(batch["x"] @ variables["up"]["kernel"])
    return jnp.sum((hidden @ variables["down"]["kernel"] - batch["y"]) ** 2), jnp.float32(
        batch["x"].shape[0]
    )


def batch(number):
    """Two shapes, so that two functions are compiled."""
    rows = 4 + 4 * (number % 2)
    x = np.random.default_rng(number).normal(size=(rows, 16)).astype(np.float32)
    return {"x": x, "y": x[:, :4]}


class Watch(Callback):
    """Samples the resources of this process."""

    def __init__(self, every):
        self.every, self.compilations, self.samples = every, 0, []

    def count(self, event, seconds, **named):
        self.compilations += event == "/jax/core/compile/backend_compile_duration"

    def needs_state(self, trainer, step):
        return trainer.is_due(self.every, step)

    def on_step(self, trainer, loss):
        if not trainer.is_due(self.every):
            return
        gc.collect()
        process = Path("/proc/self")
        self.samples.append(
            {
                "memory": int((process / "statm").read_text().split()[1])
                * os.sysconf("SC_PAGESIZE"),
                "files": len(list((process / "fd").iterdir())),
                "threads": len(list((process / "task").iterdir())),
                "arrays": len(jax.live_arrays()),
                "compilations": self.compilations,
            }
        )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_long_run_needs_constant_resources(tmp_path):
    keys = jax.random.split(jax.random.key(0), 2)
    up, down = jax.random.normal(keys[0], (16, 32)), jax.random.normal(keys[1], (32, 4))
    base = {"up": {"kernel": up}, "down": {"kernel": down}}
    batches = [batch(number) for number in range(10)]
    watch = Watch(max(STEPS // 20, 1))
    jax.monitoring.register_event_duration_secs_listener(watch.count)
    (tmp_path / "metrics").mkdir()
    metrics = MetricsLog(tmp_path / "metrics")
    standard = jax.numpy_dtype_promotion("standard")  # which Adam needs
    with open(os.devnull, "w") as screen, standard:
        trainer = Trainer(
            loss_fn,
            base,
            jl.lora_init(jax.random.key(1), base, jl.LoraConfig(rank=2, dropout=0.1)),
            optax.adam(1e-3),
            batches,
            steps=STEPS,
            run=tmp_path / "run",
            callbacks=[
                Report(10, reporter=PlainReporter(screen), log=metrics.log),
                Validate(batches, 20),
                Checkpoint(20),
                watch,
            ],
        )
        assert trainer.train().steps == STEPS
    jax.monitoring.unregister_event_duration_listener(watch.count)
    warm, *later = watch.samples[len(watch.samples) // 3 :]
    for sample in later:
        for name, most in warm.items():
            assert sample[name] <= most + SLACK.get(name, 0), (name, watch.samples)
    assert len(list((tmp_path / "run").iterdir())) <= 6
