"""The rows of the benchmarks agree, and their figures are correct."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks import accelerator, ahead_of_time, catalogue, forms, hlo, measure, report
from benchmarks.accelerator_steps import accelerator_of
from benchmarks.decoder import SIZES
from benchmarks.recorder import Recorder, read_records
from benchmarks.train_step import ORDERS, available, chosen
from jax_lora.plan.accelerators import ACCELERATORS, parse_target
from jax_lora.plan.compiled_step import StepMemory
from jax_lora.plan.target_plan import TargetPlan

TINY = forms.Case(SIZES["tiny"], rank=2)
ONE_LAYER = dataclasses.replace(TINY, size=dataclasses.replace(TINY.size, layers=1))
PEERS = [row for row in catalogue.ROWS if row.startswith(("qwix", "nnx"))]
# Each is compared with full fine-tuning.
OWN = [row for row in catalogue.ROWS if row not in (*PEERS, "full fine-tuning")]


@pytest.fixture(autouse=True)
def _default_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
def test_all_rows_have_the_same_loss_and_gradients() -> None:
    catalogue.check(ONE_LAYER, OWN)


@pytest.mark.slow
def test_scanned_rows_have_the_same_loss_and_gradients() -> None:
    catalogue.check(dataclasses.replace(TINY, scan=True), [catalogue.FACTORED, "jax_lora (auto)"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.parametrize("row", PEERS)
def test_other_libraries_have_the_same_loss_and_gradients(row: str) -> None:
    rows, left_out = available(ONE_LAYER, [row])
    if left_out:
        pytest.skip(left_out[row])
    catalogue.check(ONE_LAYER, rows)


@pytest.mark.slow
def test_a_row_with_other_gradients_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(case: forms.Case, weights: forms.Weights) -> forms.Form:
        form = catalogue.ROWS[catalogue.FACTORED](case, weights)
        gradients = lambda tree: jax.tree.map(lambda leaf: leaf / 2, form.gradients(tree))  # noqa: E731
        return dataclasses.replace(form, gradients=gradients)

    monkeypatch.setattr(catalogue, "ROWS", {**catalogue.ROWS, "halved": halved})
    with pytest.raises(RuntimeError, match="halved: gradient a of params/block_0"):
        catalogue.check(ONE_LAYER, ["halved"])


@pytest.mark.slow
def test_remat_does_not_change_the_loss() -> None:
    weights = forms.make_weights(ONE_LAYER)

    def loss(remat: str) -> float:
        case = dataclasses.replace(ONE_LAYER, remat=remat)
        form = catalogue.ROWS[catalogue.FACTORED](case, weights)
        return float(jax.jit(form.loss)(form.trainable, form.frozen, weights.tokens))

    want = loss("none")
    for remat in ("full", "dots", "dots-no-batch"):
        assert abs(loss(remat) - want) < 1e-5, remat


def test_dot_flops_of_a_step_match_the_formula() -> None:
    case = forms.Case(SIZES["384x6"])
    weights = forms.abstract_weights(case)
    tokens, width, hidden = case.size.tokens, case.size.width, case.size.hidden
    blocks = case.size.layers * (4 * width**2 + 3 * width * hidden)
    head = width * case.size.vocabulary
    attention = case.size.layers * 3 * 2 * 2 * tokens * case.size.length * width
    assert _dot_flops(case, "full fine-tuning") == 6 * tokens * (blocks + head) + attention
    # Frozen kernels need no gradient, and q, k and v of the first layer need no gradient of x.
    first = 3 * width**2
    pairs = 2 * sum(a.size + b.size for a, b in weights.factors.values())
    # Neither do the factors of these kernels.
    saved = 2 * 3 * width * case.rank * tokens
    want = 4 * tokens * (blocks + head) - 2 * tokens * first + attention
    assert _dot_flops(case, catalogue.FACTORED) == want + 3 * tokens * pairs - saved


def _dot_flops(case: forms.Case, row: str) -> float:
    weights, tx = forms.abstract_weights(case), optax.adamw(1e-4)
    form = catalogue.ROWS[row](case, weights)
    state = jax.eval_shape(tx.init, form.trainable)
    step = measure.make_step(form, tx)
    return measure.dot_flops(
        jax.make_jaxpr(step)(form.trainable, state, form.frozen, weights.tokens)
    )


def test_every_iteration_of_a_scan_counts() -> None:
    unrolled, scanned = (
        _dot_flops(dataclasses.replace(TINY, scan=scan), "full fine-tuning")
        for scan in (False, True)
    )
    assert unrolled == scanned


def test_residuals_exclude_arguments() -> None:
    def loss(w: jax.Array, x: jax.Array, _: Any) -> jax.Array:
        h = jnp.sin(x @ w)  # its cosine, (2, 3), is a residual
        return jnp.sum(h.reshape(3, 2).T * 2.0)

    w, x = jax.ShapeDtypeStruct((4, 3), jnp.float32), jax.ShapeDtypeStruct((2, 4), jnp.float32)
    assert measure.residual_bytes(loss, w, x, None) == 2 * 3 * 4


@pytest.mark.slow
def test_remat_saves_memory_in_unrolled_layers_with_the_memory_optimized_scheduler_only() -> None:
    case = forms.Case(SIZES["384x6"], remat="dots-no-batch")
    weights, tx = forms.abstract_weights(case), optax.adamw(1e-4)
    form = catalogue.ROWS["full fine-tuning"](case, weights)
    usual, least = (
        measure.figures(form, tx, weights.tokens, options)[0] for options in ORDERS.values()
    )
    assert least.temp_bytes < 0.8 * usual.temp_bytes
    assert least.dot_flops == usual.dot_flops and least.residual_bytes == usual.residual_bytes


def test_runs_are_interleaved() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: float(order.append(name) or 1.0) for name in "ab"}
    assert measure.interleave(runs, 3) == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert order == ["a", "b"] * 3


def test_an_unknown_row_is_an_error_that_lists_the_rows() -> None:
    with pytest.raises(SystemExit, match="no row matches 'nothing'; rows: full fine-tuning"):
        chosen(["nothing"])


def test_writing_a_section_replaces_only_that_section(tmp_path: pathlib.Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("# Title\n\nBefore.\n", encoding="utf-8")
    report.write_section(document, "one", "first")
    report.write_section(document, "two", "other")
    report.write_section(document, "one", "second")
    text = document.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\nBefore.\n")
    assert "first" not in text and text.index("second") < text.index("other")


def test_operations_of_a_compiled_function_are_parsed_with_their_flops() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w) @ w.T

    x, w = jnp.ones((8, 16)), jnp.ones((16, 32))
    computations = hlo.read(jax.jit(f).lower(x, w).compile().as_text() or "")
    operations = [each for computation in computations.values() for each in computation]
    assert sum(each.dot_flops for each in operations) == 2 * 2 * 8 * 16 * 32


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_the_figures_of_a_device_are_found_by_its_kind(kind: str, name: str | None) -> None:
    assert accelerator_of(kind) is (ACCELERATORS[name] if name else None)


def test_an_error_is_recorded_and_the_next_measurement_runs(tmp_path: pathlib.Path) -> None:
    recorder = Recorder(tmp_path / "records.jsonl", time.monotonic() + 60)

    def fail() -> dict[str, Any]:
        raise ValueError("no such kernel")

    recorder.run("attention", "first", fail)
    recorder.run("attention", "second", lambda: {"y": 0.25, "right": True})
    late = Recorder(tmp_path / "records.jsonl", time.monotonic() - 1)
    late.run("attention", "third", lambda: {"y": 0.0})
    with (tmp_path / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"section": "cut')
    first, second, third = read_records(tmp_path / "records.jsonl")
    assert first["error"] == "ValueError: no such kernel"
    assert second["y"] == 0.25 and second["right"]
    assert third["error"] == "skipped: no time was left"
    text = accelerator.describe([first, second, third])
    assert "Every result is right." in text and "0.2500" in text
    assert "* attention, first: ValueError: no such kernel" in text
    wrong = accelerator.describe([second | {"right": False}])
    assert "WRONG: ['attention: second']" in wrong


def test_a_plan_above_a_limit_is_not_kept() -> None:
    def plan(case: ahead_of_time.Case, traffic: float) -> TargetPlan:
        memory = StepMemory(3 * 10**9, 0, 0, 10**9, 1, 1.0)
        target = parse_target(case.target)
        return TargetPlan(target, case.remat, memory, traffic, {}, 1e12, 0.0, case.length)

    cases = (*ahead_of_time.GPU_CASES, *ahead_of_time.TPU_CASES)
    low, high = ({case: plan(case, traffic) for case in cases} for traffic in (30e9, 346e9))
    assert all(limit.passed for limit in ahead_of_time.limits(low))
    missed = [limit.what for limit in ahead_of_time.limits(high) if not limit.passed]
    assert missed == [
        "8B, names: traffic GB",
        "8B, full: traffic GB",
        "1B, names: traffic GB",
        "1B on v5p, names: traffic GB",
    ]
    assert ahead_of_time.figures(low).count("\n") == 1 + len(cases)


@pytest.mark.slow
def test_every_part_of_the_accelerator_benchmark_runs_at_toy_sizes(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "benchmarks.accelerator", str(tmp_path), "--rehearse"]
    subprocess.run(command, check=True, timeout=500)
    records = json.loads((tmp_path / "accelerator.json").read_text(encoding="utf-8"))
    errors = {each["row"]: each["error"] for each in records if "error" in each}
    assert set(errors) <= {"PEFT"}, errors
    sections = {each["section"] for each in records}
    assert sections == {"device", "attention", "lora_apply", "step", "profile", "peers"}
    text = (tmp_path / "accelerator.md").read_text(encoding="utf-8")
    assert "Every result is right." in text
