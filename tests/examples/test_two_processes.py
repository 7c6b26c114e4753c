"""The example two_processes.py."""

import contextlib
import io
import re
import subprocess
import sys
import time

import numpy as np
import pytest

import jax_lora as jl
from jax_lora.bundled import model_path


def losses(text):
    return [float(x) for x in re.search(r"loss (\S+) -> (\S+)", text).groups()]


@pytest.fixture(scope="module")
def two(script, tmp_path_factory):
    """The adapter of two processes, their output, and what the example prints."""
    out, said, run = tmp_path_factory.mktemp("two") / "adapter", [], script.run
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(script, "run", lambda *given: said.extend(run(*given)) or said)
        script.main(["--steps", "3", "--out", str(out)])
    return out, said, printed.getvalue()


@pytest.mark.slow
def test_both_processes_see_all_devices_and_the_same_loss(two):
    for index, said in enumerate(two[1]):
        assert f"process {index} of 2: 2 of 4 devices" in said
    first, last = losses(two[1][0])
    assert losses(two[1][1]) == [first, last]
    assert last < first - 0.1


@pytest.mark.slow
def test_two_processes_train_the_same_adapter_as_one(script, two, tmp_path):
    out, said, _ = two
    (alone,) = script.run(1, steps=3, out=tmp_path / "one", timeout=300)
    assert "process 0 of 1: 4 of 4 devices" in alone
    np.testing.assert_allclose(losses(alone), losses(said[0]), rtol=1e-5)
    base = {"params": jl.models.load(model_path(), dtype="float32")[1]}
    one, both = (jl.load_adapter(folder, base=base) for folder in (tmp_path / "one", out))
    for path, pair in one.pairs.items():
        assert pair.b.any()
        np.testing.assert_allclose(pair.b, both.pairs[path].b, atol=2e-4, err_msg=path)
    assert len(list(out.glob("arrays-*"))) == 1  # saved once


@pytest.mark.slow
def test_it_prints_its_results(two):
    lines = two[2].splitlines()
    assert [line[:14] for line in lines[:-1]] == ["process 0 of 2"] * 2 + ["process 1 of 2"] * 2
    assert re.fullmatch(r"saved adapter: 0\.[4-9]\d MB", lines[-1])  # compressed


@pytest.mark.slow
def test_an_error_in_saving_ends_both_processes(script, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(SystemExit, match=r"process \d failed(.|\n)*a file of that name"):
        script.run(2, steps=1, out=tmp_path / "taken", timeout=300)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.fixture
def stand_ins(script, monkeypatch):
    """Replace the workers by other programs, and return their processes."""
    started = []

    def begin(*programs):
        def start(index, processes, port, steps, out, log):
            command = [sys.executable, "-c", programs[index]]
            started.append(subprocess.Popen(command, stdout=log, stderr=log, text=True))
            return started[-1]

        monkeypatch.setattr(script, "start", start)
        return started

    return begin


SLEEP = "import time; time.sleep(600)"


@pytest.mark.parametrize("dies", [0, 1])
def test_a_failed_worker_ends_the_other(script, stand_ins, tmp_path, dies):
    programs = [SLEEP, SLEEP]
    programs[dies] = "raise SystemExit('no room on the device')"
    workers, began = stand_ins(*programs), time.monotonic()
    message = rf"process {dies} failed; output of all processes:(.|\n)*no room on the device"
    with pytest.raises(SystemExit, match=message):
        script.run(2, steps=1, out=tmp_path, timeout=300)
    assert time.monotonic() - began < 30
    assert workers[1 - dies].returncode < 0  # killed


def test_a_killed_worker_ends_the_other(script, stand_ins, tmp_path):
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    workers = stand_ins(SLEEP, killed)
    with pytest.raises(SystemExit, match="process 1 failed"):
        script.run(2, steps=1, out=tmp_path, timeout=300)
    assert workers[0].returncode < 0


def test_a_timeout_ends_all_workers(script, stand_ins, tmp_path):
    workers = stand_ins(SLEEP, "pass")  # one is done, the other waits for it
    with pytest.raises(SystemExit, match="not done after 1 s; increase --timeout"):
        script.run(2, steps=1, out=tmp_path, timeout=1)
    assert [worker.returncode for worker in workers] == [-9, 0]


def test_an_interrupt_leaves_no_worker_behind(script, stand_ins, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    workers = stand_ins(SLEEP, SLEEP)
    monkeypatch.setattr(script, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.run(2, steps=1, out=tmp_path, timeout=300)
    assert all(worker.returncode == -9 for worker in workers)
