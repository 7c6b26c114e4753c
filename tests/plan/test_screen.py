"""A plan on the screen, at 80 columns."""

import dataclasses

import pytest

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.data_shapes import BatchShape, DataShapes
from jax_lora.plan.fit import Change, Fit
from jax_lora.plan.plan_tables import fit_lines, plan_lines
from jax_lora.plan.planned_model import plan_shape
from jax_lora.plan.planning import Choices, make_plan
from jax_lora.plan.program import ProgramMemory

ROWS = DataShapes("/a/very/long/path" * 9, (BatchShape(2048, 2048, 10**6),), 10**7, 10**10)


def lines_of(name, **settings):
    choices = Choices(TrainSettings(**settings))
    plan = make_plan(plan_shape(name, None), ROWS, choices, compiling=False)
    return plan_lines(plan, 1e12)


def test_the_widest_plan_fits_80_columns():
    lines = lines_of("gpt3-175b", targets="q_proj,v_proj".split(","), rank=4)
    assert max(map(len, lines)) <= 80
    assert not any(line != line.rstrip() for line in lines)


def test_the_papers_numbers_stand_under_gpt3_and_no_other():
    text = "\n".join(lines_of("gpt3-175b", targets=("q_proj", "v_proj"), rank=4))
    assert "18,874,368 numbers" in text and "36.0 MiB" in text and "cannot be right" in text
    assert "paper" not in "\n".join(lines_of("gpt2"))


def test_quantized_columns_are_called_arithmetic():
    text = "\n".join(lines_of("gpt2"))
    assert "int8, NF4: by formula; not a training mode of this command yet." in text
    assert "Time: an estimate" in text


def test_what_the_compiler_says_is_shown_for_one_device_and_for_all():
    plan = make_plan(plan_shape("gpt2", None), ROWS, Choices(TrainSettings()), compiling=False)
    program = ProgramMemory(10**9, 10**8, 10**8, 2 * 10**9, 2, 1.25)
    text = "\n".join(plan_lines(dataclasses.replace(plan, program=program, why=""), 1e12))
    assert "in 1.2 s" in text
    assert "peak of a device                        3 GB" in text
    assert "2 devices together                      6 GB" in text


def change(flags, cost=1):
    return Change(cost, flags, "what it costs", lambda choices: choices)


def fitted(fits, changes, totals, quantize="none"):
    choices = Choices(TrainSettings(), quantize=quantize)
    return Fit(fits, 30e9, changes, totals, choices)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (fitted(True, (), ()), "30 GB fits 24 GB (5% is left free)."),
        (fitted(False, (), ()), "30 GB does not fit 24 GB (5% is left free)."),
        (fitted(True, (change("--rank 4"),), (20e9,)), "Type:\n  jax-lora train"),
        (fitted(False, (change("--rank 4"),), (29e9,)), "Nothing fits: with all of these it is 29"),
        (fitted(True, (change("NF4 base"),), (9e9,), "nf4"), "Only a quantized base fits"),
    ],
)
def test_every_end_of_a_search_is_said(found, says):
    text = "\n".join(fit_lines(found, 24e9, "jax-lora train"))
    assert says in text


def test_a_long_command_is_broken_where_a_shell_goes_on():
    command = "jax-lora train MODEL " + " ".join(f"--a-long-flag-{n} value" for n in range(8))
    lines = fit_lines(fitted(True, (change("--rank 4"),), (20e9,)), 24e9, command)
    typed = lines[lines.index("Type:") + 1 :]
    assert len(typed) > 1 and max(map(len, lines)) <= 80
    assert " ".join("".join(typed).replace("\\", "").split()) == command
