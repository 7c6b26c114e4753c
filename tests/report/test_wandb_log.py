"""Metrics of a run in Weights & Biases, with a package of the same interface on the path."""

import json
import os
import subprocess
import sys

import pytest

from jax_lora.errors import ConfigError
from jax_lora.report.metrics import MetricsLog
from jax_lora.report.wandb_log import RUN_ID

PACKAGE = """
import json, os
class Run:
    def __init__(self, options):
        if os.environ.get("WANDB_MODE") != "offline":
            raise RuntimeError("api_key not configured")
        self.id = options.get("id", "abc")
        self._write("init", {k: v for k, v in options.items() if k != "dir"})
    def _write(self, *call):
        with open("calls.jsonl", "a") as out:
            out.write(json.dumps(call) + "\\n")
    def log(self, values, step):
        self._write("log", values, step)
    def finish(self):
        self._write("finish")
def init(**options):
    return Run(options)
"""
SCRIPT = """
import sys
from pathlib import Path
from jax_lora.report.metrics import MetricsLog
log = MetricsLog(Path("run"), wandb={"rank": 2}, resume_at=int(sys.argv[1]))
log.log({"iter": 2, "train_loss": 1.5, "learning_rate": float("nan")})
log.close()
"""


@pytest.fixture
def logged(tmp_path):
    (tmp_path / "wandb.py").write_text(PACKAGE)
    (tmp_path / "run").mkdir()

    def run(step, **environment):
        found = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        found["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        words = [sys.executable, "-c", SCRIPT, str(step)]
        done = subprocess.run(
            words, cwd=tmp_path, env=found | environment, capture_output=True, text=True
        )
        calls = tmp_path / "calls.jsonl"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done, [json.loads(line) for line in lines]

    return run


@pytest.mark.slow
def test_a_run_is_logged_and_resumed_under_its_id(logged, tmp_path):
    done, calls = logged(0, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    options = {"project": "jax-lora", "name": "run", "config": {"rank": 2}}
    assert calls == [["init", options], ["log", {"train_loss": 1.5}, 2], ["finish"]]
    assert (tmp_path / "run" / RUN_ID).read_text() == "abc\n"
    _, calls = logged(1, WANDB_MODE="offline", WANDB_PROJECT="mine")
    assert calls[3][1] == options | {"project": "mine", "id": "abc", "resume": "allow"}


@pytest.mark.slow
def test_a_refused_run_is_one_message(logged):
    done, _ = logged(0)
    assert "log: wandb" in done.stderr and "RuntimeError: api_key not configured" in done.stderr
    assert "set WANDB_MODE=offline" in done.stderr


def test_without_the_package_a_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed.*\n.*\n.*pip install wandb"):
        MetricsLog(tmp_path, wandb={})
