"""The form of a contraction: chosen by shape and type, and never one that loses the update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.transform import strategies
from tests.lora_cases import adapt, assert_bitwise, assert_close, merged_tree, random_tree


def sizes(**changes):
    usual = dict(
        tokens=1024,
        inputs=384,
        outputs=1024,
        x_dtype=jnp.float32,
        w_dtype=jnp.float32,
        precision=None,
        dropout=False,
        stored=True,
    )
    return strategies.Sizes(**{**usual, **changes})


@pytest.mark.parametrize(
    "form, changes, platform, want, why",
    [
        ("auto", {}, "cpu", "merged", "1,024 tokens, at least 279: merging costs less"),
        ("auto", {"tokens": 279}, "cpu", "factored", "279 tokens, under 279: merging costs more"),
        ("auto", {"tokens": 280}, "cpu", "merged", "280 tokens, at least 279: merging costs less"),
        ("auto", {"tokens": 1}, "cpu", "factored", "1 tokens, under 279: merging costs more"),
        ("auto", {"w_dtype": jnp.bfloat16}, "cpu", "factored", "W0 is bfloat16, so a merged weight would lose the update"),
        ("auto", {"x_dtype": jnp.float16}, "cpu", "factored", "x is float16, so a merged weight would lose the update"),
        ("auto", {"dropout": True}, "cpu", "factored", "dropout applies to the data of the factors only"),
        ("auto", {}, "gpu", "factored", "gpu multiplies float32 with fewer bits at this precision, so a merged weight would lose the update"),
        ("auto", {}, "tpu", "factored", "tpu multiplies float32 with fewer bits at this precision, so a merged weight would lose the update"),
        ("auto", {"precision": (lax.Precision.HIGHEST,) * 2}, "gpu", "merged", "1,024 tokens, at least 279: merging costs less"),
        ("auto", {"precision": (lax.Precision.HIGHEST, lax.Precision.HIGH)}, "gpu", "factored", None),
        ("auto", {"w_dtype": jnp.float64, "x_dtype": jnp.float64}, "gpu", "merged", None),
        ("factored", {}, "cpu", "factored", "selected by the caller"),
        ("merged", {"tokens": 1}, "cpu", "merged", "selected by the caller"),
        ("merged", {"w_dtype": jnp.bfloat16}, "cpu", "factored", "W0 is bfloat16, so a merged weight would lose the update"),
        ("merged", {"dropout": True}, "cpu", "factored", "dropout applies to the data of the factors only"),
    ],
)  # fmt: skip
def test_the_form_follows_from_shapes_types_and_platform(form, changes, platform, want, why):
    choice = strategies.Strategy(platform, form).choose(sizes(**changes))
    assert choice.form == want
    assert why is None or choice.why == why


def test_the_default_precision_of_the_process_counts():
    with jax.default_matmul_precision("highest"):
        assert strategies.Strategy("gpu").choose(sizes()).form == "merged"


def test_an_unknown_form_is_refused():
    with pytest.raises(jl.errors.ConfigError) as error:
        jl.lora_apply(lambda x: x, form="dense")
    for part in (
        "lora_apply: form",
        "'dense'",
        "auto, factored, merged",
        "Omit it for the default",
    ):
        assert part in str(error.value)


# -----------------------------------------------------------------------------------------------
# Every form under every transformation
# -----------------------------------------------------------------------------------------------


def model(params, x):
    q, k = x @ params["q"], jnp.einsum("...d,dhk->...hk", x, params["k"])
    return jnp.tanh(q + k.reshape(q.shape)) @ params["o"] + x


TREE = random_tree({"q": (6, 8), "k": (6, 4, 2), "o": (8, 6)})
X = random_tree((3, 5, 6), 2)
ADAPTER = adapt(model, TREE, X)


def run(form, adapter, x=X, tree=TREE):
    return jl.lora_apply(model, on_materialize="error", form=form)(jl.combine(tree, adapter), x)


def run_merged(adapter, x=X):
    return model(merged_tree(TREE, adapter), x)


@pytest.mark.parametrize("form", strategies.FORMS)
class TestEveryForm:
    def test_starts_as_the_base_model_bit_by_bit(self, form):
        kernels = jl.find_kernels(model, TREE, X)
        config = jl.LoraConfig(rank=2, targets=list(kernels))
        fresh = jl.lora_init(jax.random.key(0), TREE, config, kernels=kernels)
        assert_bitwise(jax.jit(lambda: run(form, fresh))(), jax.jit(lambda: model(TREE, X))())

    def test_runs_without_jit(self, form):
        assert_close(run(form, ADAPTER), run_merged(ADAPTER), 1e-5)

    def test_has_hessian_vector_products(self, form):
        loss = lambda f: lambda adapter: (f(adapter) ** 2).sum()  # noqa: E731
        hvp = lambda f: jax.jvp(jax.grad(loss(f)), (ADAPTER,), (ADAPTER,))[1]  # noqa: E731
        got, want = jax.jit(lambda: (hvp(lambda a: run(form, a)), hvp(run_merged)))()
        assert_close(got, want, 1e-4)

    def test_has_reverse_over_reverse_derivatives(self, form):
        loss = lambda f: lambda adapter: (f(adapter) ** 2).sum()  # noqa: E731
        norm = lambda f: lambda a: sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss(f))(a)))  # noqa: E731
        got, want = jax.jit(
            lambda: (
                jax.grad(norm(lambda a: run(form, a)))(ADAPTER),
                jax.grad(norm(run_merged))(ADAPTER),
            )
        )()
        assert_close(got, want, 1e-4)

    def test_maps_over_adapters(self, form):
        several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), ADAPTER)
        grad = lambda f: jax.vmap(jax.grad(lambda adapter, x: (f(adapter, x) ** 2).sum()))  # noqa: E731
        got, want = jax.jit(
            lambda: (grad(lambda a, x: run(form, a, x))(several, X), grad(run_merged)(several, X))
        )()
        assert_close(got, want, 1e-4)

    def test_gives_gradients_per_example(self, form):
        def per_example(f):
            loss = lambda adapter, x: (f(adapter, x) ** 2).sum()  # noqa: E731
            return jax.vmap(jax.grad(loss), (None, 0))

        got, want = jax.jit(
            lambda: (
                per_example(lambda a, x: run(form, a, x))(ADAPTER, X),
                per_example(run_merged)(ADAPTER, X),
            )
        )()
        assert_close(got, want, 1e-4)

    def test_leaves_the_base_without_a_gradient(self, form):
        grads = jax.jit(jax.grad(lambda tree: (run(form, ADAPTER, tree=tree) ** 2).sum()))(TREE)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))

    def test_moves_with_what_the_model_scales_a_kernel_by(self, form):
        def gained(params, gain, x):
            return x @ (params["q"] * gain[None])

        gain = random_tree((8,), 3)
        adapter = adapt(gained, TREE, gain, X)
        with_lora = jl.lora_apply(gained, on_materialize="error", form=form)
        ours = lambda gain: (with_lora(jl.combine(TREE, adapter), gain, X) ** 2).sum()  # noqa: E731
        theirs = lambda gain: (gained(merged_tree(TREE, adapter), gain, X) ** 2).sum()  # noqa: E731
        assert_close(*jax.jit(lambda: (jax.grad(ours)(gain), jax.grad(theirs)(gain)))(), 1e-4)


@pytest.mark.parametrize("shape", [(128, 128), (256, 256), (256, 448), (384, 1024), (512, 512)])
@pytest.mark.parametrize(
    "rank",
    [pytest.param(1, marks=pytest.mark.slow), 8, 9, pytest.param(32, marks=pytest.mark.slow)],
)
def test_the_merged_form_is_right_at_the_sizes_of_real_kernels(shape, rank):
    # XLA for CPU once fused the sum over the rank into the product, and gave wrong numbers.
    rng = np.random.default_rng(0)
    sizes = ((1280, shape[0]), shape, (shape[0], rank), (rank, shape[1]))
    x, w, a, b = (jnp.asarray(rng.standard_normal(size), jnp.float32) for size in sizes)
    pair = jl.LoraPair(a=a, b=b, scale=0.5)
    lora = jl.combine({"kernel": w}, jl.Adapter({"kernel": pair}, {}, jl.LoraConfig(rank=rank)))
    model = lambda params, x: x @ params["kernel"]  # noqa: E731
    y = jax.jit(jl.lora_apply(model, form="merged"))(lora, x)
    wide = [np.asarray(each, np.float64) for each in (x, w, a, b)]
    right = wide[0] @ (wide[1] + 0.5 * wide[2] @ wide[3])
    np.testing.assert_allclose(y, right, atol=2e-5 * np.abs(right).max())


@pytest.mark.parametrize("rank", [4, 8, 9, 16, 64])
def test_forming_a_merged_weight_keeps_nothing_of_its_size_times_the_rank(rank):
    size, layers = 256, 14
    keys = [f"w{i}" for i in range(layers)]
    spec = jax.ShapeDtypeStruct
    tree = {key: spec((size, size), jnp.float32) for key in keys}
    a, b = spec((size, rank), jnp.float32), spec((rank, size), jnp.float32)
    pairs = {key: jl.LoraPair(a=a, b=b, scale=0.5) for key in keys}
    lora = jl.combine(tree, jl.Adapter(pairs, {}, jl.LoraConfig(rank=rank)))

    def model(params, x):
        for key in keys:
            x = jnp.tanh(x @ params[key])
        return x

    lowered = jax.jit(jl.lora_apply(model, form="merged")).lower(
        lora, spec((512, size), jnp.float32)
    )
    kept = lowered.compile().memory_analysis().temp_size_in_bytes
    # Every layer's a · b and its sum with W0, should none be freed early, and the data.
    assert kept < 4 * (2 * layers + 1) * size * size + 4 * 4 * 512 * size
