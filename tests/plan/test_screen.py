"""The text of a plan, at 80 columns."""

import dataclasses

import pytest

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.compiled_step import StepMemory
from jax_lora.plan.data_shapes import BatchShape, DataShapes
from jax_lora.plan.fit import Change, Fit
from jax_lora.plan.plan_tables import fit_lines, plan_lines
from jax_lora.plan.planned_model import plan_shape
from jax_lora.plan.planning import make_plan

DATA = DataShapes("/a/very/long/path" * 9, (BatchShape(2048, 2048, 10**6),), 10**7, 10**10)


def lines_of(name, **settings):
    plan = make_plan(plan_shape(name, None), DATA, TrainSettings(**settings), compiling=False)
    return plan_lines(plan, 1e12)


def test_the_widest_plan_fits_80_columns():
    lines = lines_of("gpt3-175b", targets="q_proj,v_proj".split(","), rank=4)
    assert max(map(len, lines)) <= 80
    assert not any(line != line.rstrip() for line in lines)


def test_the_figures_of_the_paper_follow_gpt3_only():
    text = "\n".join(lines_of("gpt3-175b", targets=("q_proj", "v_proj"), rank=4))
    assert "18,874,368 parameters" in text and "36.0 MiB" in text and "is impossible" in text
    assert "paper" not in "\n".join(lines_of("gpt2"))


def test_the_command_for_a_quantized_base_is_named():
    text = "\n".join(lines_of("gpt2"))
    assert "int8, NF4: `train --quantize`; a dequantized layer is not counted." in text
    assert "Time: a lower bound" in text


def test_the_compiled_memory_is_shown_per_device_and_in_total():
    plan = make_plan(plan_shape("gpt2", None), DATA, TrainSettings(), compiling=False)
    compiled = StepMemory(10**9, 10**8, 10**8, 2 * 10**9, 2, 1.25)
    text = "\n".join(plan_lines(dataclasses.replace(plan, compiled=compiled, why=""), 1e12))
    assert "in 1.2 s" in text
    assert "peak memory per device                      3 GB" in text
    assert "peak memory of 2 devices                    6 GB" in text


def test_the_memory_of_the_process_is_shown_beside_that_of_the_step():
    plan = make_plan(plan_shape("gpt2", None), DATA, TrainSettings(), compiling=False)
    compiled = StepMemory(10**9, 10**8, 10**8, 2 * 10**9, 2, 1.25)
    known = dataclasses.replace(plan, compiled=compiled, why="", process=3 * 10**8)
    text = "\n".join(plan_lines(known, 1e12))
    assert "Python, JAX and the compiled step         300 MB" in text
    assert "peak memory of the process                6.3 GB" in text
    unknown = "\n".join(plan_lines(dataclasses.replace(known, process=None), 1e12))
    assert "Python, JAX" not in unknown and "of the process" not in unknown


def change(flags, cost=1):
    return Change(cost, flags, "its effect", {})


def fitted(fits, changes, totals):
    return Fit(fits, 30e9, changes, totals, TrainSettings())


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (fitted(True, (), ()), "30 GB fits into 24 GB (5% is left free)."),
        (fitted(False, (), ()), "30 GB does not fit into 24 GB (5% is left free)."),
        (fitted(True, (change("--rank 4"),), (20e9,)), "Run:\n  jax-lora train"),
        (fitted(False, (change("--rank 4"),), (29e9,)), "This does not fit either: 29"),
    ],
)
def test_every_result_of_a_search_is_shown(found, says):
    text = "\n".join(fit_lines(found, 24e9, "jax-lora train"))
    assert says in text


def test_a_long_command_is_continued_with_backslashes():
    command = "jax-lora train MODEL " + " ".join(f"--a-long-flag-{n} value" for n in range(8))
    lines = fit_lines(fitted(True, (change("--rank 4"),), (20e9,)), 24e9, command)
    typed = lines[lines.index("Run:") + 1 :]
    assert len(typed) > 1 and max(map(len, lines)) <= 80
    assert " ".join("".join(typed).replace("\\", "").split()) == command
