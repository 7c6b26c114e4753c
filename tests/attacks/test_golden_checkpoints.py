"""Checkpoints that earlier versions wrote load and resume."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.errors import CheckpointError
from jax_lora.finetune.callbacks import Checkpoint
from jax_lora.finetune.run_folder import find_checkpoint
from jax_lora.finetune.trainer import Trainer
from jax_lora.finetune.training_state import read_record

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
VARIABLES = {"kernel": jnp.arange(8.0).reshape(4, 2) / 8}
BATCHES = [{"x": jnp.ones((2, 4)) * (i + 1) / 4, "y": jnp.ones((2, 2))} for i in range(3)]
LEAVES = {"adapter": lambda t: t.adapter.pairs["kernel"].b, "whole": lambda t: t.variables}


def loss_fn(variables, batch):
    error = batch["x"] @ variables["kernel"] - batch["y"]
    return jnp.sum(error**2), jnp.float32(error.shape[0])


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def trainer(kind, run, **options):
    adapter = jl.lora_init(jax.random.key(0), VARIABLES, jl.LoraConfig(rank=2))
    adapter = adapter if kind == "adapter" else None
    optimizer, callbacks = optax.adamw(0.01), [Checkpoint(2)]
    options = {"steps": 4, "callbacks": callbacks, "run": run} | options
    return Trainer(loss_fn, VARIABLES, adapter, optimizer, BATCHES, **options)


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("version", sorted(each.name for each in RUNS.iterdir()))
def test_a_run_of_each_format_resumes(tmp_path, version, kind):
    folder = shutil.copytree(RUNS / version / kind, tmp_path / "run")
    assert find_checkpoint(folder).name == "step-000002"
    resumed, whole = trainer(kind, folder, resume=True), trainer(kind, None)
    assert resumed.step == 2
    for each in (resumed, whole):
        each.train()
    for one, other in zip(
        *(jax.tree.leaves(LEAVES[kind](t)) for t in (resumed, whole)), strict=True
    ):
        # The first steps ran with another JAX on another processor, which round differently.
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert read_record(folder / "step-000004")["version"] == 2


def test_a_renamed_checkpoint_without_a_mark_is_refused(tmp_path):
    folder = shutil.copytree(RUNS / "version_1" / "adapter", tmp_path / "run")
    (folder / "step-000002").rename(folder / "step-000003")
    with pytest.raises(CheckpointError, match="training.json of step 2"):
        trainer("adapter", folder, resume=True)
