"""A file system that refuses: our own error, nothing lost, nothing left behind."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import CheckpointError, LoraError
from jax_lora.finetune.run_folder import RunFolder
from jax_lora.finetune.training_state import save_state
from jax_lora.models import Llama
from jax_lora.report.metrics import MetricsLog
from tests.file_limits import largest_file
from tests.tiny_model import TINY, random_params

ROOT = Path(__file__).parents[2]


def large_adapter(seed):
    a, b = np.random.default_rng(seed).normal(size=(2, 300, 64)).astype(np.float32)
    return jl.Adapter({"kernel": jl.LoraPair(a, b.T.copy())}, {}, jl.LoraConfig(rank=64))


def save_run(folder, seed):
    if folder.exists():
        run, _ = RunFolder.resume(folder, checkpoint="step-000001")
    else:
        run, _ = RunFolder.prepare(folder)

    def write(part):
        jl.save_adapter(part, large_adapter(seed))
        save_state(part, {"m": np.ones((300, 64))}, {})

    run.save(seed + 1, write)


def save_metrics(folder, seed):
    folder.mkdir(exist_ok=True)
    log = MetricsLog(folder, resume_at=seed)
    for step in range(1000):
        log.log({"iter": seed + step, "train_loss": 1.0})


@functools.cache
def params():
    return random_params(Llama(TINY))


def save_model(folder, seed):
    jl.models.save(folder, Llama(TINY), params())


WRITERS = {
    "save_adapter": lambda p, seed: jl.save_adapter(p, large_adapter(seed), overwrite=True),
    "peft": lambda p, seed: jl.peft.save(p, large_adapter(seed), names={"kernel": "m.proj"}),
    "model": save_model,
    "run": save_run,
    "metrics": save_metrics,
}


def contents(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def names(folder):
    return sorted(each.name for each in folder.rglob("*")) if folder.exists() else []


@pytest.mark.parametrize("size", [0, 300, 20_000])
@pytest.mark.parametrize("name", ["save_adapter", "peft", "model", "run"])
def test_a_file_that_is_too_large_is_our_own_error(tmp_path, capfd, name, size):
    write = WRITERS[name]
    first, second = tmp_path / "first", tmp_path / "second"
    write(second, 0)
    before = contents(second)
    with largest_file(size):
        for folder in (first, second):
            with pytest.raises(LoraError, match=r"File too large[\s\S]*ulimit -f"):
                write(folder, 1)
    assert set(names(first)) <= {"run.json"} and contents(second) == before
    assert capfd.readouterr().err == ""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB, which needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_our_own_error(small_disk, capfd, name):
    write = WRITERS[name]
    if name != "metrics":
        write(small_disk / "second", 0)
    before = contents(small_disk)
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 8192)))
    for folder in (small_disk / "first", small_disk / "second"):
        with pytest.raises(LoraError, match=r"No space left[\s\S]*Free some space"):
            write(folder, 1)
    (small_disk / "filler").unlink()
    after = contents(small_disk)
    assert {name: after.get(name) for name in before} == before
    extra = {Path(name).name for name in {*after} - {*before}}
    assert extra <= {"run.json", "metrics.jsonl", "metrics.csv"}
    for line in after.get("first/metrics.jsonl", b"").splitlines():
        assert line.endswith(b"}")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_disk_is_our_own_error(small_disk, name):
    if name != "metrics":
        WRITERS[name](small_disk / "second", 0)
    before = contents(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for folder in ("first", "second"):
        if name != "metrics":  # which never makes the folder
            with pytest.raises(LoraError, match=r"Read-only[\s\S]*write to another one"):
                WRITERS[name](small_disk / folder, 1)
    assert contents(small_disk) == before


@pytest.mark.parametrize("name", ["save_adapter", "peft", "model"])
def test_a_file_in_the_place_of_a_folder_is_our_own_error(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(LoraError, match="fix: .*[Mm]ove the file|move the file"):
            WRITERS[name](folder, 0)
    assert contents(tmp_path) == {"file": b"mine"}


def test_an_interrupted_save_leaves_nothing(tmp_path):
    def write(part):
        jl.save_adapter(part, large_adapter(0))
        raise KeyboardInterrupt

    run, _ = RunFolder.prepare(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run.save(1, write)
    assert names(run.path) == ["run.json"]


def test_nothing_that_cannot_be_read_is_deleted(tmp_path):
    folder = tmp_path / "adapter"
    jl.save_adapter(folder, large_adapter(0))
    (folder / "adapter.json").write_text("damaged")
    arrays = next(folder.glob("arrays-*"))
    with pytest.raises(CheckpointError):
        jl.load_adapter(folder)
    with largest_file(20_000), pytest.raises(CheckpointError):
        jl.save_adapter(folder, large_adapter(1), overwrite=True)
    assert arrays.is_dir() and (folder / "adapter.json").read_text() == "damaged"
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter", "peft", "model", "run", "metrics"])
def test_any_call_may_fail(tmp_path, name):
    command = [sys.executable, "-m", "tests.attacks.failing_system", str(tmp_path / "work"), name]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert int(done.stderr.split(f"{name}: ")[1].split()[0]) > 9
