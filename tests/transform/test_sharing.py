"""Kernels with the same data share one down-projection, whatever operations are in between."""

import jax
import jax.numpy as jnp
import pytest

import jax_lora as jl
from jax_lora.transform import sharing
from tests.lora_cases import adapt, assert_equals_merged, equations, random_tree


def shared(fn, tree, *args, **options):
    """What `explain` says each kernel shares its data with."""
    tree = jl.combine(tree, adapt(fn, tree, *args))
    sites = jl.explain(fn, tree, *args, **options).sites
    return {site.path: sorted(site.beside) for site in sites}


SQUARE = {name: (6, 6) for name in "qkv"}


def attend(params, x):
    q = jnp.tanh(x @ params["q"])
    k = q * (x @ params["k"])  # k and v come after something that needs q
    return k + x @ params["v"].T


def cast_each(params, x):
    """Every kernel casts itself and x, as Flax's layers do."""
    return sum(x.astype(jnp.float16) @ params[name].astype(jnp.float16) for name in "qkv")


def other_axes(params, x):
    return x @ params["q"] + x.T @ params["k"]


def other_data(params, x):
    return (x @ params["q"]) @ params["k"]


def waits_for_the_first(params, x):
    q = x @ params["q"]
    return x @ (params["k"] * q[:1])


def in_either_order(params, x):
    return x @ params["q"] + (params["k"].T @ x.T).T


@pytest.mark.parametrize(
    "fn, want",
    [
        (attend, {"q": ["k", "v"], "k": ["q", "v"], "v": ["k", "q"]}),
        (cast_each, {"q": ["k", "v"], "k": ["q", "v"], "v": ["k", "q"]}),
        (other_axes, {"q": [], "k": []}),
        (other_data, {"q": [], "k": []}),
        (waits_for_the_first, {"q": [], "k": []}),
    ],
)
def test_kernels_share_the_data_that_they_have_in_common(fn, want):
    assert shared(fn, random_tree(SQUARE), random_tree((6, 6), 2)) == want


@pytest.mark.parametrize(
    "fn", [attend, other_axes, other_data, waits_for_the_first, in_either_order]
)
def test_shared_products_equal_the_merged_ones(fn):
    assert_equals_merged(fn, random_tree(SQUARE), random_tree((6, 6), 2))


def thin_products(fn, tree, x, gradient=False):
    adapter = adapt(fn, tree, x)
    with_lora = jl.lora_apply(fn, form="factored")
    loss = lambda adapter, x: with_lora(jl.combine(tree, adapter), x).sum()  # noqa: E731
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)) if gradient else loss)(adapter, x)
    return sum(eqn.primitive.name == "dot_general" for eqn in equations(program.jaxpr))


def qkv(params, x):
    return sum(jnp.sin(x @ params[name]) for name in "qkv")


def test_thin_products_are_counted():
    tree, x = random_tree(SQUARE), random_tree((6, 6), 2)
    assert thin_products(qkv, tree, x) == 3 + 1 + 3  # W0; down to the rank; up again
    # dx; for the rank: da and dx of one product, db and its cotangent of three
    assert thin_products(qkv, tree, x, gradient=True) == (3 + 1 + 3) + 3 + 2 + 6


def test_dropout_gives_every_kernel_its_own_data():
    tree, x = random_tree(SQUARE), random_tree((6, 6), 2)
    kernels = jl.find_kernels(attend, tree, x)
    config = jl.LoraConfig(rank=2, targets=list(kernels), dropout=0.5)
    adapter = jl.lora_init(jax.random.key(0), tree, config, kernels=kernels)
    dropped = jl.dropout(jl.combine(tree, adapter), jax.random.key(1))
    with_lora = jl.lora_apply(attend, form="factored")
    program = jax.make_jaxpr(with_lora)(dropped, x)
    assert sum(eqn.primitive.name == "dot_general" for eqn in equations(program.jaxpr)) == 9


def test_a_group_names_what_has_to_be_prepared_early():
    def program(q, k, x):
        y = jnp.tanh(x @ q)
        return y, x @ k.T.reshape(6, 6)

    jaxpr = jax.make_jaxpr(program)(*[jnp.ones((6, 6))] * 3).jaxpr
    structural = {"transpose", "reshape"}
    groups = sharing.find_groups(jaxpr, set(jaxpr.invars[:2]))
    (group,) = groups.values()
    names = [jaxpr.eqns[index].primitive.name for index in group.early]
    assert [jaxpr.eqns[index].primitive.name for index in group.members] == ["dot_general"] * 2
    assert group.data == (0, 0) and set(names) <= structural and "transpose" in names
