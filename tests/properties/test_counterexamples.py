"""Programs that were once computed wrongly, each by the name of what went wrong.

A program that the random ones find is pasted here as it was printed, after it was made short.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.transform.forms import FORMS
from tests.lora_cases import adapt, merged_tree, random_tree
from tests.properties.judge import judge
from tests.properties.programs import Block, KernelSpec, Program


@dataclasses.dataclass(frozen=True)
class Pasted(Program):
    """A program that stands in a test as a function."""

    written: Callable[..., Any] = lambda p: p

    def function(self, precision=None):
        return self.written


def hold(function, kernels, inputs, **options):
    """Judge a pasted program in every form."""
    for form in FORMS:
        body = Block("program", (), (), ())
        program = Pasted("0/0", kernels, inputs, body, form=form, written=function, **options)
        verdict = judge(program)
        assert verdict.failure is None, verdict.failure


MATRIX = {"W0": KernelSpec((5, 3), (0,), (1,), rank=2, scale=2.0)}


@pytest.mark.parametrize("start", [-9, -6, -2, 4, 9])
def test_a_slice_that_starts_outside_is_moved_to_the_nearest_end_not_counted_from_the_other(start):
    def program(p, x0):
        here = jnp.where(x0[0, 0] < 99.0, jnp.int32(start), jnp.int32(0))  # known when it runs
        rows = lax.dynamic_slice(
            p["W0"], (here, jnp.int32(0)), (2, 3), allow_negative_indices=False
        )
        more = lax.dynamic_slice_in_dim(p["W0"], here, 2, 0)
        return x0 @ rows, x0 @ more

    hold(program, MATRIX, {"x0": (4, 2)})


def test_a_weight_divided_by_a_zero_in_the_program_is_not_finite_and_raises_nothing():
    tree, x = {"w": random_tree((5, 3))}, jnp.ones((4, 5))
    adapter = adapt(lambda p, x: x @ p["w"], tree, x)
    fn = lambda p, x: jnp.sign(p["w"] / 0.0) + (x @ (p["w"] / 0.0)).sum()  # noqa: E731
    got = jl.lora_apply(fn, on_materialize="allow")(jl.combine(tree, adapter), x)
    assert not np.isfinite(np.asarray(got)).any()
    assert not np.isfinite(np.asarray(fn(merged_tree(tree, adapter), x))).any()
    assert jax.typeof(got).shape == (5, 3)
