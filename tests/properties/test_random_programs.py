"""Whatever a program does with its weights, `lora_apply` computes what the merged weights would.

Each program is drawn from its number, run on low-rank weights and on merged ones, and compared:
values, forward and reverse derivatives. `python -m tests.properties.run` runs as many as you like.
"""

import dataclasses

import jax
import pytest

from jax_lora.transform.strategies import FORMS
from tests.properties import judge as judging
from tests.properties.judge import judge
from tests.properties.run import report, run_range, summary
from tests.properties.steps import draw_program

QUICK, EACH, FULL = 12, 31, 167  # `make test` runs the first, `make test-slow` the rest


def _hold(start, stop):
    tally = run_range(seed=0, start=start, stop=stop, shrinking=False)
    assert not tally.failures, "\n\n".join(tally.failures[:3])
    return tally


def test_the_first_programs_equal_their_merged_selves():
    _hold(0, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(QUICK, FULL, EACH))
def test_random_programs_equal_their_merged_selves(start):
    tally = _hold(start, start + EACH)
    # What is tested are the rules: most weights are never formed, and the adapters do matter.
    assert tally.counts["no weight formed"] > 0.5 * tally.counts["programs"], summary(tally, 0)
    assert tally.counts["adapter has no bearing"] < 0.2 * tally.counts["programs"]


def _hold_with_magnitudes(start, stop):
    # In float64: kernels of a few inputs often have outputs that the update all but cancels, and
    # the norm of what is left, which a magnitude is divided by, has few digits in a smaller type.
    for number in range(start, stop):
        program = draw_program(0, number, FORMS)
        program = dataclasses.replace(program, magnitudes=True, precision="float64")
        verdict = judge(program)
        assert verdict.failure is None, report(program, verdict)
    jax.clear_caches()  # no two programs share anything


def test_the_first_programs_equal_their_merged_selves_with_magnitudes():
    _hold_with_magnitudes(0, QUICK // 2)


@pytest.mark.slow
def test_random_programs_equal_their_merged_selves_with_magnitudes():
    _hold_with_magnitudes(QUICK // 2, EACH)


def test_a_program_is_drawn_again_from_its_number():
    assert draw_program(0, 17, FORMS) == draw_program(0, 17, FORMS)
    assert draw_program(0, 17, FORMS) != draw_program(1, 17, FORMS)


def test_a_program_prints_as_source_that_can_be_pasted():
    program = draw_program(0, 3, FORMS)
    text = report(program, judge(program))
    assert program.source() in text
    compile(program.source(), "pasted", "exec")


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_fault_is_not_taken_for_rounding(precision, monkeypatch):
    """Roundings are forgiven where merged weights make them too; a wrong factor is not."""
    drawn = (draw_program(0, number, FORMS) for number in range(500))
    program = next(program for program in drawn if program.precision == precision)
    verdict = judge(program)
    assert verdict.failure is None and verdict.moved
    merged_tree = judging.merged_tree

    def wrong(tree, adapter):
        pairs = {k: dataclasses.replace(v, b=v.b * 1.1) for k, v in adapter.pairs.items()}
        return merged_tree(tree, dataclasses.replace(adapter, pairs=pairs))

    monkeypatch.setattr(judging, "merged_tree", wrong)
    assert judge(program).failure is not None
