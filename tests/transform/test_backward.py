"""The backward pass: no gradient of a kernel's size, and no residual that copies a kernel."""

import jax
import jax.numpy as jnp
import pytest

import jax_lora as jl
from tests.lora_cases import adapt, equations, random_tree

LAYERS, IN, OUT = 3, 24, 40  # sizes that nothing else has
FORMS = ("factored", "merged")
RANKS = (2, 20)  # a · b is formed in another way where the rank is small


def unrolled(params, x):
    for name in ("one", "two"):
        x = jnp.tanh(x @ params[name]) @ params[name + "_back"]
    return x


def scanned(params, x):
    step = lambda x, layer: (jnp.tanh(x @ layer["up"]) @ layer["down"], None)  # noqa: E731
    return jax.lax.scan(step, x, params["stack"])[0]


MODELS = {
    "unrolled": (
        unrolled,
        {"one": (IN, OUT), "one_back": (OUT, IN), "two": (IN, OUT), "two_back": (OUT, IN)},
    ),
    "scanned": (scanned, {"stack": {"up": (LAYERS, IN, OUT), "down": (LAYERS, OUT, IN)}}),
}


def gradient_program(model, form, rank=2):
    fn, shapes = MODELS[model]
    tree, x = random_tree(shapes), jnp.ones((2, 7, IN))
    adapter = adapt(fn, tree, x, rank=rank)
    with_lora = jl.lora_apply(fn, on_materialize="error", form=form)
    loss = lambda adapter, x: (with_lora(jl.combine(tree, adapter), x) ** 2).sum()  # noqa: E731
    return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(adapter, x).jaxpr


def is_kernel(var):
    return sorted(var.aval.shape[-2:]) == [IN, OUT]


def forms_merged_weight(eqn, rank):
    """a · b: it sums over the rank alone, where a gradient sums over tokens."""
    (summed, _), (batched, _) = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return [shape[i] for i in batched] == [1] and [shape[i] for i in summed] == [rank]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_no_product_over_tokens_has_the_shape_of_a_kernel(model, form, rank):
    program = gradient_program(model, form, rank)
    products = [eqn for eqn in equations(program) if eqn.primitive.name == "dot_general"]
    assert len(products) > 10
    of_kernels = [eqn for eqn in products if any(map(is_kernel, eqn.outvars))]
    assert bool(of_kernels) == (form == "merged" and rank == 20)
    assert all(forms_merged_weight(eqn, rank) for eqn in of_kernels)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_the_factored_form_makes_nothing_of_the_shape_of_a_kernel(model, rank):
    made = [
        (eqn.primitive.name, var.aval)
        for eqn in equations(gradient_program(model, "factored", rank))
        for var in eqn.outvars
        if is_kernel(var)
    ]
    assert [name for name, _ in made if name not in ("stop_gradient", "copy")] == []


@pytest.mark.parametrize("rank", RANKS)
def test_the_merged_form_stacks_no_kernels_for_the_backward_pass(rank):
    scans = [
        eqn
        for eqn in equations(gradient_program("scanned", "merged", rank))
        if eqn.primitive.name == "scan"
    ]
    assert len(scans) == 2  # forward and backward
    assert not any(map(is_kernel, (var for eqn in scans for var in eqn.outvars)))


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_factors_in_the_merged_form_are_plain_products(model):
    """Without a batch dimension, XLA makes their transposes products of another order, for free."""
    of_factors = [
        eqn
        for eqn in equations(gradient_program(model, "merged"))
        if eqn.primitive.name == "dot_general"
        and sorted(n for n in eqn.outvars[0].aval.shape if n > 1) in ([2, IN], [2, OUT])
    ]
    kernels = 4 if model == "unrolled" else 2
    assert len(of_factors) == 2 * kernels
    assert all(eqn.params["dimension_numbers"][1] == ((), ()) for eqn in of_factors)


@pytest.mark.parametrize("model", MODELS)
def test_full_fine_tuning_would_fail_these_tests(model):
    fn, shapes = MODELS[model]
    program = jax.make_jaxpr(jax.grad(lambda tree: fn(tree, jnp.ones((2, 7, IN))).sum()))(
        random_tree(shapes)
    ).jaxpr
    products = [eqn for eqn in equations(program) if eqn.primitive.name == "dot_general"]
    assert any(map(is_kernel, (var for eqn in products for var in eqn.outvars)))
