"""Rematerialization: LoRA saves no more residuals than full fine-tuning."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

import jax_lora as jl
from tests.lora_cases import adapt, assert_close, merged_tree, random_tree

LAYERS, BATCH, TOKENS, WIDTH, HIDDEN = 3, 2, 11, 6, 10
policies = jax.checkpoint_policies
POLICIES = {
    "nothing_saveable": policies.nothing_saveable,
    "dots_with_no_batch_dims_saveable": policies.dots_with_no_batch_dims_saveable,
    "names": policies.save_only_these_names("product"),
    "names_or_dots": policies.save_from_both_policies(
        policies.save_only_these_names("product"), policies.dots_with_no_batch_dims_saveable
    ),
    "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "offload_names": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["product"],
        names_which_can_be_offloaded=[],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
FORMS = ("factored", "merged")


def block(layer, x):
    gate, up = x @ layer["gate"], checkpoint_name(x @ layer["up"], "product")
    return 0.3 * (x + jnp.tanh(jnp.tanh(gate) * up) @ layer["down"])


def unrolled(policy):
    step = jax.checkpoint(block, policy=policy)

    def model(params, x):
        for layer in params["layers"]:
            x = step(layer, x)
        return x

    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    return model, {"layers": [shapes] * LAYERS}


def scanned(policy):
    step = jax.checkpoint(block, policy=policy)

    def model(params, x):
        return jax.lax.scan(lambda x, layer: (step(layer, x), None), x, params)[0]

    stack = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    return model, {name: (LAYERS, *shape) for name, shape in stack.items()}


def around_the_whole(policy):
    """The policy of someone who wraps what lora_apply returned: no rule of ours sees it."""
    del policy

    def plain(params, x):
        for layer in params["layers"]:
            x = block(layer, x)
        return x

    return plain, unrolled(None)[1]


def kept(loss, *args):
    """The residuals that have a token axis, in numbers: kernels and factors have none."""
    residuals = jax.eval_shape(lambda *args: jax.vjp(loss, *args)[1], *args)
    return sum(leaf.size for leaf in jax.tree.leaves(residuals) if TOKENS in leaf.shape)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("build", [unrolled, scanned, around_the_whole])
def test_no_more_is_kept_than_by_full_fine_tuning(build, policy):
    fn, shapes = build(POLICIES[policy])
    wrap = lambda f: jax.checkpoint(f, policy=POLICIES[policy]) if build is around_the_whole else f  # noqa: E731
    tree, x = random_tree(shapes), random_tree((BATCH, TOKENS, WIDTH), 2)
    adapter = adapt(fn, tree, x)
    full = kept(wrap(lambda tree: fn(tree, x)), tree)
    for form in FORMS:
        with_lora = wrap(jl.lora_apply(fn, on_materialize="error", form=form))
        assert kept(lambda adapter, f=with_lora: f(jl.combine(tree, adapter), x), adapter) <= full


@pytest.mark.parametrize("form", FORMS)
def test_policies_still_see_the_base_products(form):
    """Keeping them is what the policy is for: hidden, they would be computed again."""
    fn, shapes = unrolled(POLICIES["dots_with_no_batch_dims_saveable"])
    nothing, _ = unrolled(POLICIES["nothing_saveable"])
    tree, x = random_tree(shapes), random_tree((BATCH, TOKENS, WIDTH), 2)
    adapter = adapt(fn, tree, x)

    def count(fn):
        with_lora = jl.lora_apply(fn, form=form)
        return kept(lambda adapter: with_lora(jl.combine(tree, adapter), x), adapter)

    products = LAYERS * BATCH * TOKENS * 2 * HIDDEN  # gate and up; nothing needs what down gives
    assert count(fn) - count(nothing) == products


@pytest.mark.parametrize(
    "policy", ["nothing_saveable", "dots_with_no_batch_dims_saveable", "names"]
)
@pytest.mark.parametrize("build", [unrolled, scanned])
def test_gradients_are_the_merged_ones(build, policy):
    fn, shapes = build(POLICIES[policy])
    tree, x = random_tree(shapes), random_tree((BATCH, TOKENS, WIDTH), 2)
    adapter = adapt(fn, tree, x)

    def gradients(adapter):
        yield jax.grad(lambda adapter: (fn(merged_tree(tree, adapter), x) ** 2).sum())(adapter)
        for form in FORMS:
            run = jl.lora_apply(fn, on_materialize="error", form=form)
            yield jax.grad(lambda each, f=run: (f(jl.combine(tree, each), x) ** 2).sum())(adapter)

    want, *got = jax.jit(lambda adapter: [*gradients(adapter)])(adapter)
    for gradient in got:
        assert_close(gradient, want, 1e-4)
