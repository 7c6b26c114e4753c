"""Check and time the library on the present accelerator, within eight minutes.

Attention kernels and `lora_apply` are compared with float32 references; training steps of published
shapes are timed with random weights; where torch and peft are installed, they are timed as well.
Every part runs in a process of its own with a time limit, and every result is written at once.

    python -m benchmarks.accelerator OUT             # on a GPU or TPU
    python -m benchmarks.accelerator OUT --rehearse  # every part at toy sizes, on a CPU
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import accelerator_checks, accelerator_steps, catalogue, forms, measure, report
from benchmarks.decoder import SIZES
from benchmarks.recorder import Recorder, read_records

SECONDS = 460.0
MODELS = ("llama-3.2-1b", "llama-3-8b")
# Parts of the remaining time.
SHARES = {"checks": 0.2, "llama-3.2-1b": 0.3, "llama-3-8b": 0.4, "peers": 0.3}
_HAND, _OURS = catalogue.FACTORED, "jax_lora (auto)"


def main() -> None:
    """Run every part in a process of its own, and write the report; or run one part."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("out", type=pathlib.Path, help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of everything")
    parser.add_argument("--part", choices=list(SHARES), help="run this part only, here")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    records = options.out / "records.jsonl"
    if options.part:
        recorder = Recorder(records, time.monotonic() + options.seconds)
        run_part(options.part, recorder, options.rehearse)
        return
    records.unlink(missing_ok=True)
    began, text = time.monotonic(), ""
    for number, part in enumerate(SHARES):
        share = SHARES[part] / sum(list(SHARES.values())[number:])
        left = options.seconds - (time.monotonic() - began)
        _run_process(part, records, left * share, options.rehearse)
        text = _write(options.out, read_records(records))
    print(text)


def _write(out: pathlib.Path, records: list[dict[str, Any]]) -> str:
    """Write both files, and return the report."""
    summary, text = json.dumps(records, indent=1), describe(records)
    (out / "accelerator.json").write_text(summary + "\n", encoding="utf-8")
    (out / "accelerator.md").write_text(text + "\n", encoding="utf-8")
    return text


def _run_process(part: str, records: pathlib.Path, seconds: float, rehearse: bool) -> None:
    """Run a part in a process that ends in time."""
    # The last measurement begins while it can still end.
    limit = str(max(1.0, seconds * 0.8))
    command = [sys.executable, "-m", "benchmarks.accelerator", str(records.parent)]
    command += ["--part", part, "--seconds", limit, *["--rehearse"] * rehearse]
    environment = dict(os.environ) | ({"JAX_PLATFORMS": "cpu"} if rehearse else {})
    # torch shares the device's memory in one part; the others use almost all of it.
    if part == "peers":
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    else:
        environment |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}
    try:
        code = subprocess.run(command, env=environment, check=False, timeout=seconds).returncode
        error = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        error = f"ended after {seconds:.0f} s"
    if error:
        line = json.dumps({"section": "process", "row": part, "error": error})
        with records.open("a", encoding="utf-8") as file:
            file.write("\n" + line + "\n")


def run_part(part: str, recorder: Recorder, rehearse: bool) -> None:
    """Run a part in this process."""
    recorder.run("device", part, _device)
    if part == "checks":
        accelerator_checks.check_lora(recorder, rehearse)
        accelerator_checks.check_attention(recorder, rehearse)
    elif part == "peers":
        _time_peers(recorder, rehearse)
    else:
        accelerator_steps.time_steps(recorder, part, rehearse)


def _device() -> dict[str, Any]:
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return {"device": device.device_kind, "machine": report.machine(), "bytes_limit": limit}


def _time_peers(recorder: Recorder, rehearse: bool) -> None:
    """Time one plain decoder: `lora_apply`, hand-written LoRA, and PEFT with torch."""
    case = forms.Case(SIZES["tiny" if rehearse else "1b"], rank=16, dtype=jnp.bfloat16, fused=True)
    weights = functools.cache(lambda: forms.make_weights(case))  # its errors are those of a row
    for row in (_OURS, _HAND):
        recorder.run("peers", row, functools.partial(_time_form, case, weights, row))
    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    installed = all(importlib.util.find_spec(each) for each in ("torch", "peft"))
    if device is None or not installed:
        missing = {"error": "left out: torch or peft is not installed, or has no such device"}
        recorder.run("peers", "PEFT", lambda: missing)
        return
    for compiled in (True, False):
        name = f"PEFT, {'compiled' if compiled else 'eager'}, fused attention"
        work = functools.partial(_time_peft, case, weights, device, compiled)
        recorder.run("peers", name, work)


def _time_form(case: forms.Case, weights: Callable[[], forms.Weights], row: str) -> dict[str, Any]:
    tokens = weights().tokens
    form, tx = catalogue.ROWS[row](case, weights()), optax.adamw(1e-4)
    loss = jax.jit(form.loss)(form.trainable, form.frozen, tokens)
    stages = measure.stages(form, tx, tokens)
    run = measure.Run(stages.compiled, form, tx, tokens)
    return _timed(case, run.step) | {"loss": float(loss), "compile_seconds": sum(stages.seconds)}


def _time_peft(
    case: forms.Case, weights: Callable[[], forms.Weights], device: str, compiled: bool
) -> dict[str, Any]:
    from benchmarks.torch_decoder import PeftRun

    run = PeftRun(case, weights(), device, compiled, fused_attention=True)
    found = {"loss": run.first_loss, "compile_seconds": run.first_seconds}
    return _timed(case, run.step) | found


def _timed(case: forms.Case, step: Callable[[], float]) -> dict[str, Any]:
    seconds = statistics.median(step() for _ in range(9))
    return {"step_seconds": seconds, "tokens_per_second": case.size.tokens / seconds}


# -----------------------------------------------------------------------------------------------
# The report
# -----------------------------------------------------------------------------------------------

_COLUMNS = {
    "step": {
        "remat": ("remat", str),
        "step_seconds": ("step s", lambda x: f"{x:.4f}"),
        "tokens_per_second": ("tokens/s", lambda x: f"{x:,.0f}"),
        "mfu": ("MFU", lambda x: f"{x:.3f}"),
        "peak_bytes": ("peak GB", lambda x: f"{x / 1e9:.1f}"),
        "compile_seconds": ("compile s", lambda x: f"{x:.0f}"),
    },
    "peers": {
        "step_seconds": ("step s", lambda x: f"{x:.4f}"),
        "tokens_per_second": ("tokens/s", lambda x: f"{x:,.0f}"),
        "compile_seconds": ("compile s", lambda x: f"{x:.0f}"),
        "loss": ("loss", lambda x: f"{x:.4f}"),
    },
    "attention": {
        name: (name, lambda x: f"{x:.4f}") for name in ("y", "dq", "dk", "dv")
    },
    "lora_apply": {
        name: (name, lambda x: f"{x:.4f}")
        for name in ("y", "dup a", "dup b", "ddown a", "ddown b")
    },
}  # fmt: skip
_TITLES = {
    "step": "Training steps",
    "peers": "One decoder: `lora_apply`, hand-written LoRA, PEFT",
    "attention": "Relative errors of attention kernels in bfloat16",
    "lora_apply": "Relative errors of low-rank updates in bfloat16",
}


def describe(records: list[dict[str, Any]]) -> str:
    """Return the report: tables, a profile, and errors."""
    machine = next((each["machine"] for each in records if "machine" in each), "no device")
    wrong = [f"{each['section']}: {each['row']}" for each in records if each.get("right") is False]
    lines = [f"# {machine}", "Every result is right." if not wrong else f"WRONG: {wrong}"]
    for section, title in _TITLES.items():
        rows = [each for each in records if each["section"] == section and len(each) > 4]
        if rows:
            lines += [f"## {title}", _table(rows, _COLUMNS[section])]
    for each in records:
        if "milliseconds" in each:
            lines += [f"## Time by operation, {each['row']}", _profile_table(each)]
    errors = [each for each in records if "error" in each]
    if errors:
        listed = [f"* {each['section']}, {each['row']}: {each['error']}" for each in errors]
        lines += ["## Not measured", "\n".join(listed)]
    return "\n\n".join(lines)


def _table(rows: list[dict[str, Any]], columns: dict[str, tuple[str, Any]]) -> str:
    def cell(row: dict[str, Any], name: str, show: Any) -> str:
        return "" if row.get(name) is None else show(row[name])

    body = [
        [row["row"], *(cell(row, name, show) for name, (_, show) in columns.items())]
        for row in rows
    ]
    return report.table(["", *(title for title, _ in columns.values())], body)


def _profile_table(record: dict[str, Any]) -> str:
    body = [
        [kind, f"{each:.2f}", f"{each / record['all']:.1%}"]
        for kind, each in record["milliseconds"].items()
    ]
    return report.table(["operations", "ms", "share"], body)


if __name__ == "__main__":
    main()
