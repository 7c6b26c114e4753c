"""`lora_apply` and `find_kernels` read one table of rules, so they cannot disagree on a program.

Every kernel that `lora_apply` carries to a use with its factors is found, and every kernel that it
uses is found or named as skipped. `python -m tests.properties.agreement` compares as many as you
like.
"""

import jax
import pytest

from jax_lora.transform.strategies import FORMS
from tests.properties.agreement import Readings, readings
from tests.properties.steps import draw_program

QUICK, FULL, EACH = 40, 400, 60


def _hold(start, stop):
    for number in range(start, stop):
        program = draw_program(0, number, FORMS)
        try:
            both = readings(program)
        except NotImplementedError:  # JAX itself refuses the program
            continue
        assert both.disagreement is None, f"{number}: {both.disagreement}\n{program.source()}"
    jax.clear_caches()  # no two programs share anything


def test_the_first_programs_are_read_alike():
    _hold(0, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(QUICK, FULL, EACH))
def test_random_programs_are_read_alike(start):
    _hold(start, start + EACH)


# Programs that were once read differently: a sum over all axes, kernels combined with each other,
# lookups by a scalar, unit axes, dead code.
@pytest.mark.parametrize("number", [15, 53, 58, 344, 361, 1140, 1155, 1410, 1832, 2158, 2759, 3074])
def test_programs_that_were_once_read_differently_are_read_alike(number):
    _hold(number, number + 1)


def test_a_disagreement_is_seen():
    carried = Readings(frozenset("w"), frozenset("w"), frozenset(), {})
    assert carried.disagreement == "carried by lora_apply, not found: ['w']; {}"
    used = Readings(frozenset(), frozenset("w"), frozenset(), {})
    assert used.disagreement == "used, neither found nor skipped: ['w']"
    assert Readings(frozenset(), frozenset("w"), frozenset(), {"w": "why"}).disagreement is None
