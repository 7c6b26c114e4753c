"""A process that runs commands one after another: `huggingface_hub` reads its variables once."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.xla_flags import for_devices

ROOT = Path(__file__).parents[2]


class CommandProcess:
    """Runs `jax-lora` and Python code in one process with other environment variables."""

    def __init__(self, folder, **variables):
        changed = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": for_devices(1)}
        environment = {**os.environ, **changed, **variables}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words, token=None):
        """Run a command, and return its exit code, standard output and standard error."""
        return self._send(words=list(map(str, words)), token=token)

    def python(self, code, token=None):
        """Run code, and return what it prints."""
        status, out, err = self._send(code=code, token=token)
        assert status == 0, err
        return out

    def _send(self, **task):
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def _serve():
    from jax_lora.cli import main

    for line in sys.stdin:
        task = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        if task["token"] is not None:
            os.environ["HF_TOKEN"] = task["token"]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(task["words"]) if "words" in task else exec(task["code"], {}) or 0
            except SystemExit as error:
                status = error.code
            except Exception as error:
                status = err.write(repr(error))
        answer = json.dumps([status, out.getvalue(), err.getvalue()])
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
