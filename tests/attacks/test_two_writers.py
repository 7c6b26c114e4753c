"""Two writers in one place: each succeeds or is refused, and nothing is mixed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.cli import main
from jax_lora.errors import AdapterFileError, CheckpointError, LoraError, ModelError
from jax_lora.finetune.callbacks import Checkpoint
from jax_lora.finetune.run_folder import RunFolder, claimed
from jax_lora.finetune.trainer import Trainer
from jax_lora.models import Llama
from jax_lora.storage.locks import locked
from tests.tiny_model import TINY, random_params

BASE = {"kernel": jnp.ones((8, 8))}
MODEL = Llama(TINY)


def adapter(value):
    pair = jl.LoraPair(np.full((8, 2), value), np.full((2, 8), value), scale=value)
    return jl.Adapter({"kernel": pair}, {}, jl.LoraConfig(rank=2, alpha=2 * value))


def save_peft(folder, value):
    jl.peft.save(folder, adapter(value), names={"kernel": "m.proj"})


def read_peft(folder):
    loaded = jl.peft.load(folder, BASE, names={"kernel": "m.proj"})
    return [loaded.pairs["kernel"].scale, float(loaded.pairs["kernel"].a[0, 0])]


def read_adapter(folder):
    pair = jl.load_adapter(folder).pairs["kernel"]
    return [pair.scale, *np.unique(pair.a), *np.unique(pair.b)]


@pytest.mark.parametrize(
    ("save", "read", "error"),
    [
        (
            lambda path, value: jl.save_adapter(path, adapter(value), overwrite=True),
            read_adapter,
            CheckpointError,
        ),
        (save_peft, read_peft, AdapterFileError),
    ],
)
def test_threads_that_save_to_one_place_succeed_or_are_refused(tmp_path, save, read, error):
    start, folder = threading.Barrier(4), tmp_path / "adapter"

    def write(value):
        start.wait()
        refused = 0
        for _ in range(5):
            try:
                save(folder, value)
            except error as cause:
                assert "another writer at work" in str(cause)
                refused += 1
        return refused

    with ThreadPoolExecutor(4) as pool:
        refused = sum(pool.map(write, [1.0, 2.0, 3.0, 4.0]))
    assert refused < 20
    assert len(set(read(folder))) == 1
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("save", ["adapter", "peft", "model"])
def test_a_locked_folder_is_refused_and_untouched(tmp_path, save):
    def write():
        if save == "adapter":
            jl.save_adapter(tmp_path, adapter(1.0))
        elif save == "peft":
            save_peft(tmp_path, 1.0)
        else:
            jl.models.save(tmp_path, MODEL, random_params(MODEL))

    with (
        locked(tmp_path, LoraError),
        pytest.raises((CheckpointError, AdapterFileError, ModelError)) as info,
    ):
        write()
    assert "another writer at work in this folder: process" in str(info.value)
    assert not any(tmp_path.iterdir())
    write()


# -----------------------------------------------------------------------------------------------
# Runs
# -----------------------------------------------------------------------------------------------


def test_a_claimed_run_is_refused_to_others_and_left_as_it_was(tmp_path):
    with claimed(tmp_path / "run") as lock:
        run, _ = RunFolder.prepare(tmp_path / "run", lock)
        for start in (
            lambda: RunFolder.prepare(tmp_path / "run"),
            lambda: RunFolder.resume(tmp_path / "run", checkpoint="step-000001"),
        ):
            with pytest.raises(CheckpointError, match="another writer at work"):
                start()
        run.save(1, lambda part: part.mkdir())
    assert [each.name for each in tmp_path.iterdir()] == ["run"]
    assert sorted(each.name for each in run.path.iterdir()) == ["run.json", "step-000001"]


def test_a_claim_that_comes_to_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path / "a" / "run"):
        raise KeyError
    assert not any(tmp_path.iterdir())


def test_a_run_that_was_moved_aside_does_not_write_into_the_next_one(tmp_path):
    first, _ = RunFolder.prepare(tmp_path / "run")
    first.save(1, lambda part: part.mkdir())
    second, moved = RunFolder.prepare(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another folder than the one that this run began"):
        first.save(2, lambda part: part.mkdir())
    assert not list(second.path.glob("step-*"))
    assert [each.name for each in moved.glob("step-*")] == ["step-000001"]


def test_a_lock_that_a_kill_left_is_in_nobodys_way(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text('{"pid": 1}')
    run, moved = RunFolder.prepare(tmp_path / "run")
    assert moved is None and [each.name for each in run.path.iterdir()] == ["run.json"]


def trainer(folder, **options):
    def loss_fn(variables, batch):
        return jnp.sum((batch @ variables["kernel"]) ** 2), jnp.float32(1.0)

    start = jl.lora_init(jax.random.key(0), BASE, jl.LoraConfig(rank=2))
    batches, callbacks = [jnp.ones((1, 8))], [Checkpoint(1)]
    options = {"steps": 2, "callbacks": callbacks} | options
    return Trainer(loss_fn, BASE, start, optax.sgd(1e-4), batches, run=folder, **options)


def test_a_trainer_holds_its_folder_while_it_trains_and_no_longer(tmp_path):
    refused = []

    class Rival(Checkpoint):
        def on_step(self, trainer, loss):
            try:
                RunFolder.prepare(tmp_path / "run")
            except CheckpointError:
                refused.append(trainer.step)

    first = trainer(tmp_path / "run", callbacks=[Rival()])
    first.train()
    assert refused == [1, 2]
    trainer(tmp_path / "run").train()  # as when a cell of a notebook is executed again
    with pytest.raises(CheckpointError, match="another folder"):
        first.train()
    assert (tmp_path / "run.1").is_dir()


def test_the_command_refuses_a_second_run_before_it_reads_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with claimed("same"):
        for more in ([], ["--resume"]):
            assert (
                main(["train", "no-model", "--data", "no-data", "--adapter-path", "same", *more])
                == 2
            )
            error = capsys.readouterr().err
            assert "another writer at work" in error and "no-data" not in error
    assert not any(tmp_path.glob("same*/*"))


def test_the_last_save_keeps_as_many_as_the_callback(tmp_path):
    trainer(tmp_path / "run", steps=6, callbacks=[Checkpoint(1, keep=5)]).train()
    assert len(list((tmp_path / "run").glob("step-*"))) == 5


def test_threads_that_save_one_run_save_each_step_once(tmp_path):
    run, _ = RunFolder.prepare(tmp_path / "run")

    def write(part):
        part.mkdir()
        (part / "adapter.json").write_text("{}")

    with ThreadPoolExecutor(4) as pool:
        new = list(pool.map(lambda n: run.save(n % 5 + 1, write, keep=9)[1], range(20)))
    assert sum(new) == 5
    assert len(list(run.path.glob("step-*"))) == 5
