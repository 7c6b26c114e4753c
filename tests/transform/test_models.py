"""Complete models, Linen and NNX, adapted without a change of their code."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_lora as jl
from tests.foreign.model_cases import drawn
from tests.lora_cases import (
    assert_bitwise,
    assert_close,
    assert_equals_merged,
    jit_by_operation,
    merged_tree,
    random_tree,
    randomized,
)

D, HEADS, LAYERS, VOCABULARY = 16, 2, 3, 11
TOKENS = jnp.array([[1, 4, 7, 2], [3, 3, 9, 10]])


class Block(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, _):
        make = functools.partial(nn.DenseGeneral, dtype=self.dtype, param_dtype=self.dtype)
        h = nn.LayerNorm(dtype=self.dtype, param_dtype=self.dtype)(x)
        q, k, v = (make((HEADS, D // HEADS), name=name)(h) for name in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + make(D, axis=(-2, -1), name="out")(mixed)
        h = nn.gelu(nn.Dense(4 * D, dtype=self.dtype, param_dtype=self.dtype, name="up")(x))
        return x + nn.Dense(D, dtype=self.dtype, param_dtype=self.dtype, name="down")(h), None


class Decoder(nn.Module):
    """Embedding, scanned and rematerialised blocks of DenseGeneral, tied head."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, D, dtype=self.dtype, param_dtype=self.dtype, name="embed")
        block = nn.remat(Block, prevent_cse=False)
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = blocks(self.dtype, name="layers")(embed(tokens), None)
        return embed.attend(x)


@functools.cache
def decoder(dtype=jnp.float32):
    model = Decoder(dtype)
    return model, jax.jit(model.init)(jax.random.key(0), TOKENS)


@functools.cache
def adapted(dtype=jnp.float32, targets="all-linear"):
    """The decoder, its variables, its kernels, and an adapter of them, in one compiled function."""
    model, variables = decoder(dtype)
    kernels = jl.find_kernels(model.apply, variables, TOKENS)
    config = jl.LoraConfig(rank=2, targets=targets if isinstance(targets, str) else list(targets))
    init = jax.jit(functools.partial(jl.lora_init, config=config, kernels=kernels))
    return model, variables, kernels, init(jax.random.key(0), variables)


def everything(dtype=jnp.float32):
    """`adapted`, with a pair on the embedding too."""
    return adapted(dtype, tuple(adapted(dtype)[2]))


# Flax's LayerNorm and Optax's schedules mix types themselves: with them, JAX's usual promotion.
mixed_types = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_a_scanned_remat_decoder_has_the_right_kernels():
    model, variables = decoder()
    kernels = jl.find_kernels(model.apply, variables, TOKENS)
    shapes = {path.removeprefix("params/"): k for path, k in kernels.items()}
    query, out = shapes["layers/query/kernel"], shapes["layers/out/kernel"]
    assert (query.stack_axes, query.in_axes, query.out_axes) == ((0,), (1,), (2, 3))
    assert (out.stack_axes, out.in_axes, out.out_axes) == ((0,), (1, 2), (3,))
    assert (shapes["embed/embedding"].kind, shapes["embed/embedding"].uses) == ("embedding", 2)
    assert len(kernels) == 7  # and no bias, scale or stacked vector


def test_all_linear_adapts_every_dense_kernel_of_the_decoder():
    model, variables, kernels, adapter = adapted()
    assert len(adapter.pairs) == 6
    assert adapter.size == sum(kernels[path].pair_size(2) for path in adapter.pairs)
    assert adapter.pairs["params/layers/query/kernel"].a.shape == (LAYERS, D, 2)
    assert adapter.pairs["params/layers/query/kernel"].b.shape == (LAYERS, 2, HEADS, D // HEADS)


@mixed_types
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jitted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_step_zero_is_the_base_model_bit_by_bit(dtype, jitted):
    model, variables, _, adapter = everything(dtype)
    base = jit_by_operation(model.apply) if jitted else model.apply
    lora = jl.lora_apply(model.apply, on_materialize="error")
    lora = jit_by_operation(lora) if jitted else lora
    assert_bitwise(lora(jl.combine(variables, adapter), TOKENS), base(variables, TOKENS))


@pytest.mark.slow
def test_the_decoder_equals_its_merged_self_without_materialising():
    model, variables, _, adapter = everything()
    assert_equals_merged(model.apply, variables, TOKENS, adapter=randomized(adapter, size=0.1))


@mixed_types
def test_a_bfloat16_base_keeps_its_type_and_the_factors_theirs():
    model, variables, _, adapter = everything(jnp.bfloat16)

    def loss(each):
        logits = jl.lora_apply(model.apply, on_materialize="error")(
            jl.combine(variables, each), TOKENS
        )
        assert logits.dtype == jnp.bfloat16
        return (logits.astype(jnp.float32) ** 2).mean()

    text = str(jax.make_jaxpr(jax.grad(loss))(adapter))
    for shape in (f"f32[{LAYERS},{D},{4 * D}]", f"f32[{D},{4 * D}]", f"f32[{4 * D},{D}]"):
        assert shape not in text  # no base-sized float32 array
    tx = optax.adam(1e-5)
    state, start = jax.jit(tx.init)(adapter), adapter
    step = jax.jit(lambda a, s: _update(tx, loss, a, s))
    for _ in range(3):
        adapter, state = step(adapter, state)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype for leaf in (*jax.tree.leaves(adapter), *moments)} == {jnp.dtype("float32")}
    changed = jax.tree.map(lambda new, old: np.any(np.asarray(new) != old), adapter, start)
    assert all(jax.tree.leaves(changed))


def _update(tx, loss, adapter, state):
    updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
    return optax.apply_updates(adapter, updates), state


@pytest.mark.slow
def test_differentiating_the_whole_tree_costs_what_the_adapter_alone_costs():
    model, variables, kernels, adapter = adapted()

    def loss(tree):
        return (jl.lora_apply(model.apply)(tree, TOKENS) ** 2).mean()

    def of_adapter(variables, adapter):
        return jax.grad(lambda each: loss(jl.combine(variables, each)))(adapter)

    def of_everything(variables, adapter):
        return jl.partition(jax.grad(loss)(jl.combine(variables, adapter)))[1]

    alone, whole = (
        jax.jit(f).lower(variables, adapter).compile() for f in (of_adapter, of_everything)
    )
    assert whole.cost_analysis()["flops"] == alone.cost_analysis()["flops"]
    assert whole.memory_analysis().temp_size_in_bytes == alone.memory_analysis().temp_size_in_bytes
    assert_bitwise(whole(variables, adapter), alone(variables, adapter))
    zero = jl.partition(jax.grad(loss)(jl.combine(variables, adapter)))[0]
    leaves = jl.paths.flatten_with_paths(zero)[0]
    assert not any(leaf.any() for path, leaf in leaves if path in adapter.pairs)


def test_the_backward_pass_has_no_cotangent_of_a_kernel():
    model, variables, kernels, adapter = adapted()
    loss = lambda a: (jl.lora_apply(model.apply)(jl.combine(variables, a), TOKENS) ** 2).mean()  # noqa: E731
    flat = {kernels[path].shape[1:] for path in adapter.pairs}
    products = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                products.append(eqn.outvars[0].aval.shape)
            for sub in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
            ):
                if hasattr(getattr(sub, "jaxpr", sub), "eqns"):
                    visit(getattr(sub, "jaxpr", sub))

    visit(jax.make_jaxpr(jax.grad(loss))(adapter).jaxpr)
    assert len(products) > 30
    assert not {shape for shape in products if shape in flat or shape[::-1] in flat}


def test_methods_mutable_collections_and_rngs():
    class Model(nn.Module):
        def setup(self):
            self.encoder, self.head, self.norm = nn.Dense(8), nn.Dense(3), nn.BatchNorm()
            self.drop = nn.Dropout(0.5)

        def __call__(self, x, train=True):
            h = self.norm(self.encode(x), use_running_average=not train)
            self.sow("intermediates", "hidden", h)
            return self.head(self.drop(h, deterministic=not train))

        def encode(self, x):
            return nn.relu(self.encoder(x))

    model, x = Model(), random_tree((4, 6))
    rngs = {"dropout": jax.random.key(5)}
    variables = jax.jit(model.init)({"params": jax.random.key(0), **rngs}, x)
    config = jl.LoraConfig(rank=2, targets=["encoder", "head"])
    init = functools.partial(jl.lora_init, config=config)
    adapter = randomized(jax.eval_shape(init, jax.random.key(0), variables))
    combined, merged = jl.combine(variables, adapter), jax.jit(merged_tree)(variables, adapter)
    run = jl.lora_apply(model.apply, on_materialize="error")
    for options in (
        {"method": "encode"},
        {"method": Model.encode},
        {"train": False},
        {"rngs": rngs, "mutable": ["batch_stats"]},
        {"train": False, "mutable": ["intermediates"]},
        {"train": False, "capture_intermediates": True, "mutable": "intermediates"},
    ):
        got, want = jax.jit(
            lambda *trees, options=options: [
                fn(tree, x, **options) for fn, tree in zip((run, model.apply), trees, strict=True)
            ]
        )(combined, merged)
        assert_close(got, want, 1e-5)


def test_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(6, 8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.down = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.down(self.attention(nnx.gelu(self.up(x))))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    state, x = drawn(shapes), random_tree((2, 4, 6))
    forward = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    kernels = jl.find_kernels(forward, state, x)
    assert kernels["attention/query/kernel"].out_axes == (1, 2)
    assert kernels["attention/out/kernel"].in_axes == (0, 1)
    config = jl.LoraConfig(rank=2, targets=list(kernels))
    init = jax.jit(functools.partial(jl.lora_init, config=config, kernels=kernels))
    adapter = init(jax.random.key(0), state)
    run = jit_by_operation(jl.lora_apply(forward, on_materialize="error"))
    base = jit_by_operation(forward)
    assert_bitwise(run(jl.combine(state, adapter), x), base(state, x))
    adapter = randomized(adapter)
    merged = jax.jit(merged_tree)(state, adapter)
    assert_close(run(jl.combine(state, adapter), x), base(merged, x), 1e-5)


@mixed_types
def test_a_train_step_compiles_once_and_learns():
    model, variables, kernels, adapter = adapted()
    tx = optax.adam(1e-2)
    traces = []

    def loss(each, tokens):
        traces.append(None)
        logits = jl.lora_apply(model.apply)(jl.combine(variables, each), tokens)
        labels = jnp.roll(tokens, -1, 1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(adapter, state, tokens):
        value, gradient = jax.value_and_grad(loss)(adapter, tokens)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state, losses = jax.jit(tx.init)(adapter), []
    for _ in range(20):
        adapter, state, value = step(adapter, state, TOKENS)
        losses.append(float(value))
    assert len(traces) == 1
    assert losses[-1] < 0.7 * losses[0]
    assert np.isfinite(losses).all()
