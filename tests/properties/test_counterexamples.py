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
from jax_lora.transform.strategies import FORMS
from tests.lora_cases import adapt, merged_tree, random_tree
from tests.properties.judge import judge
from tests.properties.programs import Block, KernelSpec, Program, choice, fit


@dataclasses.dataclass(frozen=True)
class Pasted(Program):
    """A program that stands in a test as a function."""

    written: Callable[..., Any] = lambda p: p

    def function(self, precision=None):
        return self.written


def hold(function, kernels, inputs, name="0/0", **options):
    """Judge a pasted program in every form; its numbers are drawn by its name."""
    for form in FORMS:
        body = Block("program", (), (), ())
        program = Pasted(name, kernels, inputs, body, form=form, written=function, **options)
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


def test_a_rounding_that_the_flat_end_of_a_tanh_makes_large_is_no_fault():
    # The slope 1 - y * y is 0.001 there, with a tenth of a thousandth of it in y's last digit.
    kernels = {"W2": KernelSpec((4, 3, 3), (0,), (1, 2), rank=1, scale=2.0)}

    def program(p, x0, x1):
        w2 = p["W2"]
        v1 = fit(x1, (3, 2, 3))

        def body5(d2):
            w3 = w2[3:4:1]
            v4 = jnp.tanh(jnp.einsum("bcm,chm->hb", w3, v1))
            return fit(v4, (2, 3))

        return (jax.vmap(body5, in_axes=(1,), out_axes=0)(v1),)

    inputs = {"x0": (2, 2), "x1": (3,)}
    hold(program, kernels, inputs, "0/7447", precision="float32", outer="data")


@pytest.mark.slow
def test_what_xla_makes_of_a_slice_of_a_slice_is_not_held_against_the_library():
    # Of b's first columns, the last. XLA (jax 0.10, 0.11) makes one slice of the two, and forgets
    # where the inner one ends (openxla/xla issue 49121). Merged weights happen to be spared here.
    kernels = {"W2": KernelSpec((1, 3), (0,), (1,), rank=1)}

    def program(p, x0):
        w1 = lax.dynamic_slice_in_dim(p["W2"], choice(x0, 3) - 4, 2, 1)
        return (jnp.take(w1, 3 + choice(x0, 2), axis=1, mode="clip"),)

    hold(program, kernels, {"x0": (4, 3, 3)}, "0/9961", precision="float64")
