"""Save something again and again, while the n-th call that changes the file system fails.

Run in a process by itself, because an audit hook stays. Arguments: a folder, and names of `SAVES`.
Prints one line for every save whose failure was not handled well.
"""

import errno
import os
import shutil
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_lora as jl
from jax_lora.errors import LoraError
from jax_lora.finetune.commit_mark import check_mark
from jax_lora.finetune.run_folder import RunFolder
from jax_lora.finetune.training_state import find_resumable, save_state
from jax_lora.models import Llama
from jax_lora.report.metrics import MetricsLog, read_metrics
from tests.tiny_model import TINY, random_params

PARAMS = {"kernel": jnp.ones((4, 4))}
MODEL = Llama(TINY)
WHOLE = random_params(MODEL)


class Failure:
    """Fails the n-th call, and counts."""

    def __init__(self):
        self.left, self.number, self.lock = 0, errno.ENOSPC, threading.Lock()
        sys.addaudithook(self._audit)
        self._fsync, self._write = os.fsync, os.write
        os.fsync = self._checked(os.fsync)
        os.write = self._checked(os.write)

    def _checked(self, call):
        def checked(*args):
            self._count()
            return call(*args)

        return checked

    def _audit(self, event, args):
        if event in ("os.rename", "os.mkdir", "os.truncate") or (
            event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            self._count()

    def _count(self):
        with self.lock:
            if self.left > 0:
                self.left -= 1
                if self.left == 0:
                    raise OSError(self.number, os.strerror(self.number))


def adapter(value):
    pair = jl.LoraPair(jnp.full((4, 2), value), jnp.full((2, 4), value))
    return jl.Adapter({"kernel": pair}, {}, jl.LoraConfig(rank=2))


def save_adapter(folder, value):
    jl.save_adapter(folder, adapter(value), base=PARAMS, overwrite=True)


def save_peft(folder, value):
    path = "kernel"
    pair = jl.LoraPair(jnp.full((4, 2), value), jnp.full((2, 4), value), scale=value)
    one = jl.Adapter({path: pair}, {}, jl.LoraConfig(rank=2, alpha=2 * value))
    jl.peft.save(folder, one, names={path: "model.proj"})


def save_model(folder, value):
    params = jax.tree.map(lambda leaf: leaf * value, WHOLE)
    params = params if value == 1.0 else jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    jl.models.save(folder, MODEL, params)


def save_run(folder, value):
    if not (folder / "config.yaml").exists():
        run, _ = RunFolder.prepare(folder)
    else:
        run, _ = RunFolder.resume(folder, checkpoint=find_resumable(folder).name)
    run.write_config({"rank": value})
    moments = optax.adam(0.1).init(PARAMS)
    step = int(10 * value)

    def write(part):
        jl.save_adapter(part, adapter(value), base=PARAMS)
        save_state(part, moments, {"ledger": {"step": step}})

    run.save(step, write, keep=1)


def save_metrics(folder, value):
    if value == 1.0:
        folder.mkdir()
    log = MetricsLog(folder, resume_at=int(value * 10) - 1)
    log.log({"iter": int(value * 10), "train_loss": value})
    log.close()


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def check_adapter(folder, old, new):
    now = {name for name in contents(folder) if not name.startswith("arrays-")}
    assert now == {"adapter.json"} and len(list(folder.glob("arrays-*"))) == 1
    assert len(list(folder.iterdir())) == 2
    pair = jl.load_adapter(folder, base=PARAMS).pairs["kernel"]
    assert np.unique(np.concatenate([pair.a.ravel(), pair.b.ravel()])).size == 1


def check_files(folder, old, new):
    assert contents(folder) in (old, new), sorted(contents(folder))


def check_run(folder, old, new):
    steps = sorted(each.name for each in folder.glob("step-*"))
    assert steps in (["step-000010"], ["step-000020"], ["step-000010", "step-000020"]), steps
    for step in steps:
        check_mark(folder / step, required=True)
        find_resumable(folder / step)
        jl.load_adapter(folder / step, base=PARAMS)
    others = {each.name for each in folder.iterdir()} - {*steps}
    assert others == {"run.json", "config.yaml"}, others


def check_metrics(folder, old, new):
    assert {each.name for each in folder.iterdir()} == {"metrics.jsonl", "metrics.csv"}
    assert [row["iter"] for row in read_metrics(folder)] in ([10], [10, 20])


SAVES = {
    "adapter": (save_adapter, check_adapter),
    "peft": (save_peft, check_files),
    "model": (save_model, check_files),
    "run": (save_run, check_run),
    "metrics": (save_metrics, check_metrics),
}


def attack(name, root, failure):
    save, check = SAVES[name]
    start, done, work = root / f"{name}-old", root / f"{name}-new", root / f"{name}-work"
    root.mkdir(exist_ok=True)
    save(start, 1.0)
    old = contents(start)
    shutil.copytree(start, done)
    save(done, 2.0)
    new = contents(done)
    for number in range(1, 400):
        for first in (False, True)[: 1 if name == "metrics" else 2]:
            shutil.rmtree(work, ignore_errors=True)
            if not first:
                shutil.copytree(start, work)
            failure.left = number
            try:
                save(work, 2.0)
                raised = None
            except LoraError as error:
                raised = str(error)
            except BaseException as error:
                raised = ""
                print(f"{name} {number} {first}: {type(error).__name__}: {error}")
            fired, failure.left = failure.left == 0, 0
            try:
                if raised is not None and first and name != "run":
                    assert not work.exists(), sorted(work.rglob("*"))
                elif not first:
                    check(work, old, new)
                if raised is None:
                    assert first or name in ("run", "adapter") or contents(work) == new
                elif raised:
                    assert "fix:" in raised and "No space left" in raised, raised
            except Exception as error:
                print(f"{name} {number} {first}: {type(error).__name__}: {error}; {raised}")
        if not fired:
            print(f"{name}: {number - 1} calls", file=sys.stderr)
            return
    print(f"{name}: there is no end")


if __name__ == "__main__":
    failing = Failure()
    for each in sys.argv[2:]:
        attack(each, Path(sys.argv[1]), failing)
