"""First and second derivatives of every consumer, in every form, against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

import jax_lora as jl
from jax_lora.adapter import Adapter
from jax_lora.transform.strategies import FACTORED, MERGED
from jax_lora.updates import LoraPair

# name -> (shape of the kernel, its in, out and stack axes, shape of x, the function)
CONSUMERS = {
    "dense": ((3, 2), (0,), (1,), (), (2, 3), lambda w, x: x @ w),
    "dense, one token": ((3, 2), (0,), (1,), (), (3,), lambda w, x: x @ w),
    "weight first": ((2, 3), (1,), (0,), (), (3, 2), lambda w, x: w @ x),
    "met by its outputs": ((2, 3), (0,), (1,), (), (2, 3), lambda w, x: x @ w.T),
    "heads": ((3, 2, 2), (0,), (1, 2), (), (2, 3), lambda w, x: jnp.einsum("td,dhk->htk", x, w)),
    "experts": ((2, 3, 2), (1,), (2,), (0,), (2, 2, 3),
                lambda w, x: jnp.einsum("eci,eio->eco", x, w)),
    "both sides met": ((3, 2), (0,), (1,), (), (2, 3, 2),
                       lambda w, x: jnp.einsum("tio,io->t", x, w)),
    "scanned": ((2, 3, 3), (1,), (2,), (0,), (2, 3),
                lambda w, x: lax.scan(lambda h, v: (jnp.sin(h @ v), None), x, w)[0]),
    "shared": ((3, 4), (0,), (1,), (), (2, 3),
               lambda w, x: (x @ w[:, :2]) * jnp.sin(x @ w[:, 2:])),
    "scaled by what is trained": ((3, 2), (0,), (1,), (), (2, 3),
                                  lambda w, x: x @ (w * x[0][:, None])),
    "gather": ((4, 3), (0,), (1,), (), (2, 3), lambda w, x: x * w[jnp.array([0, 3])]),
    "gather of a stack": ((2, 3, 2), (1,), (2,), (0,), (2, 3),
                          lambda w, x: jnp.einsum("ti,tio->to", x, w[jnp.array([1, 1])])),
    "ragged_dot": ((2, 3, 2), (1,), (2,), (0,), (3, 3),
                   lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 2], jnp.int32))),
    "conv": ((2, 2, 3), (0, 1), (2,), (), (1, 3, 2),
             lambda w, x: lax.conv_general_dilated(
                 x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))),
    "grouped conv": ((2, 1, 2), (0, 1), (2,), (), (1, 3, 2),
                     lambda w, x: lax.conv_general_dilated(
                         x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"),
                         feature_group_count=2)),
}  # fmt: skip
OTHERS = ("gather", "ragged_dot", "conv", "grouped conv")  # they have one form
CONTRACTIONS = [name for name in CONSUMERS if name not in OTHERS]
CASES = [(name, form) for name in CONTRACTIONS for form in (FACTORED, MERGED)]
CASES += [(name, "auto") for name in OTHERS]


def _drawn(shape, seed):
    return 0.6 * np.random.default_rng(seed).normal(size=shape)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), CASES)
def test_derivatives_to_second_order(name, form):
    shape, in_axes, out_axes, stack_axes, x_shape, fn = CONSUMERS[name]
    size = lambda axes: tuple(shape[axis] for axis in axes)  # noqa: E731
    with jax.enable_x64(True):
        x, w, a, b = (
            jnp.asarray(_drawn(each, seed))
            for seed, each in enumerate(
                (
                    x_shape,
                    shape,
                    (*size(stack_axes + in_axes), 2),
                    (*size(stack_axes), 2, *size(out_axes)),
                )
            )
        )
        run = lambda p, x: jnp.tanh(fn(p["w"], x))  # noqa: E731
        with_lora = jl.lora_apply(run, on_materialize="error", form=form)

        @jax.jit
        def of_factors_and_data(a, b, x):
            pair = LoraPair(a, b, in_axes, out_axes, stack_axes, scale=1.5)
            return with_lora(jl.combine({"w": w}, Adapter({"w": pair}, {}, jl.LoraConfig())), x)

        hold = functools.partial(
            check_grads, of_factors_and_data, (a, b, x), atol=1e-7, rtol=1e-6, eps=1e-5
        )
        if name == "ragged_dot":  # JAX has no gradient of this operation's gradient
            hold(order=2, modes=("fwd",))
            hold(order=1, modes=("rev",))
        else:
            hold(order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("form", [FACTORED, MERGED])
def test_the_form_that_was_asked_for_is_the_one_that_was_checked(form):
    for name in CONTRACTIONS:
        shape, in_axes, out_axes, stack_axes, x_shape, fn = CONSUMERS[name]
        kernel = jl.Kernel("w", shape, jnp.dtype("float32"), "dense", in_axes, out_axes, stack_axes)
        tree = {"w": jnp.ones(shape)}
        adapter = jl.lora_init(
            jax.random.key(0), tree, jl.LoraConfig(rank=2, targets="w"), kernels={"w": kernel}
        )
        run = lambda p, x, fn=fn: fn(p["w"], x)  # noqa: E731
        sites = jl.explain(run, jl.combine(tree, adapter), jnp.ones(x_shape), form=form).sites
        assert {site.form for site in sites} == {form}, name
