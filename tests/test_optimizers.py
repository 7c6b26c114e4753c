import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.adapter import LoraWeight
from jax_lora.errors import ConfigError, StructureError
from jax_lora.optimizers import masked_optimizer, trainable_mask

BASE_SHAPES = {(3, 12, 20), (12, 20), (20, 12), (5,)}


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    # Optax raises floats to its integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


def toy(dtype=jnp.float32):
    """A base with a stack, biases, integers, bools, both zeros and subnormals, and its adapter."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype)  # noqa: E731
    odd = np.array([0.0, -0.0, 1e-40, -1e-40, 1.0], jnp.dtype(dtype))
    params = {
        "layers": {"kernel": normal(3, 12, 20)},
        "up": {"kernel": normal(12, 20), "bias": normal(20)},
        "down": {"kernel": normal(20, 12)},
        "head": normal(2, 7),
        "odd": jax.device_put(odd),
        "ints": jnp.array([1, -7], jnp.int8),
        "bools": jnp.array([True, False]),
    }
    pairs = {
        "layers/kernel": pair(draw, (3, 12), (3,), (20,), in_axes=(1,), out_axes=(2,), stack=(0,)),
        "up/kernel": pair(draw, (12,), (), (20,)),
        "down/kernel": pair(draw, (20,), (), (12,)),
    }
    whole = {"head": jnp.asarray(draw.normal(size=(2, 7)), jnp.float32)}
    return params, jl.Adapter(pairs, whole, jl.LoraConfig(rank=2, alpha=4.0))


def pair(draw, inputs, stack_shape, outputs, in_axes=(0,), out_axes=(1,), stack=()):
    a = jnp.asarray(draw.normal(size=(*inputs, 2)), jnp.float32)
    b = jnp.asarray(draw.normal(size=(*stack_shape, 2, *outputs)), jnp.float32)
    return jl.LoraPair(a, b, in_axes, out_axes, stack, scale=2.0)


def hostile_gradients(tree, seed, fill=None):
    """Gradients that a frozen leaf must survive: random numbers, or `fill`, in every leaf."""
    draw = np.random.default_rng(seed)

    def gradient(leaf, trainable):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        if fill is not None and not trainable:
            return np.full(leaf.shape, fill, leaf.dtype)
        return draw.normal(size=leaf.shape).astype(leaf.dtype)

    return jax.tree.map(gradient, tree, trainable_mask(tree))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def run(tx, lora_params, gradients, steps=3, **extra):
    """Take steps in one jitted function each, as a training loop does."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(lora_params)
    for _ in range(steps):
        lora_params, state = step(lora_params, state, gradients)
    return lora_params, state


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2, weight_decay_rate=0.1),
    "adagrad": lambda: optax.adagrad(1e-2),
    "fromage": lambda: optax.fromage(1e-2),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "lars": lambda: optax.lars(1e-2, weight_decay=0.1),
    "lion": lambda: optax.lion(1e-3, weight_decay=0.1),
    "nadamw": lambda: optax.nadamw(1e-2),
    "novograd": lambda: optax.novograd(1e-2, weight_decay=0.1),
    "radam": lambda: optax.radam(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "sm3": lambda: optax.sm3(1e-2),
    "clipped_chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "multi_steps": lambda: optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adamw(1e-2), 3),
    "ema": lambda: optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "muon": lambda: optax.contrib.muon(1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_leaves_the_base_bitwise_and_trains_the_adapter(name):
    params, adapter = toy()
    lora_params = jl.combine(params, adapter)
    trained, _ = run(
        masked_optimizer(OPTIMIZERS[name]()), lora_params, hostile_gradients(lora_params, 3)
    )
    base, changed = jl.partition(trained)
    assert bits(base) == bits(params)
    for before, after in zip(jax.tree.leaves(adapter), jax.tree.leaves(changed), strict=True):
        assert not np.array_equal(before, after)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_has_no_leaf_of_a_base_shape(name):
    params, adapter = toy()
    lora_params = jl.combine(params, adapter)
    state = jax.eval_shape(masked_optimizer(OPTIMIZERS[name]()).init, lora_params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert not shapes & BASE_SHAPES


@pytest.mark.parametrize("fill", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_frozen_leaves_survive_any_gradient(fill, dtype):
    params, adapter = toy(dtype)
    lora_params = jl.combine(params, adapter)
    gradients = hostile_gradients(lora_params, 5, fill)
    tx = masked_optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
    trained, _ = run(tx, lora_params, gradients)
    base, changed = jl.partition(trained)
    assert bits(base) == bits(params)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(changed))


def test_negative_zero_survives_op_by_op_too():
    params, adapter = toy()
    params["odd"] = jnp.array([0.0, -0.0])  # subnormals are flushed by XLA on CPU outside jit
    lora_params = jl.combine(params, adapter)
    tx = masked_optimizer(optax.adamw(1e-2, weight_decay=0.1))
    updates, _ = tx.update(hostile_gradients(lora_params, 3), tx.init(lora_params), lora_params)
    base, _ = jl.partition(optax.apply_updates(lora_params, updates))
    assert bits(base) == bits(params)


def test_a_hundred_adamw_steps_on_a_real_loss_leave_the_base_bitwise():
    params, adapter = toy()
    x = jax.random.normal(jax.random.key(4), (6, 12))

    def model(params, x):
        hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
        return hidden @ params["down"]["kernel"]

    loss = lambda tree, x: jnp.mean((jl.lora_apply(model)(tree, x) - x) ** 2)  # noqa: E731
    tree = {name: params[name] for name in ("up", "down")}
    pairs = {path: pair for path, pair in adapter.pairs.items() if not path.startswith("layers")}
    tree = jl.combine(tree, jl.Adapter(pairs, {}, adapter.config))
    tx = masked_optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-2)))

    @jax.jit
    def step(tree, state):
        value, gradients = jax.value_and_grad(loss)(tree, x)
        updates, state = tx.update(gradients, state, tree)
        return optax.apply_updates(tree, updates), state, value

    state, values, start = tx.init(tree), [], bits(jl.partition(tree)[0])
    for _ in range(100):
        tree, state, value = step(tree, state)
        values.append(float(value))
    assert bits(jl.partition(tree)[0]) == start
    assert values[-1] < 0.5 * values[0]
    assert step._cache_size() == 1


def test_clipping_sees_the_gradients_of_the_adapter_only():
    params, adapter = toy()
    lora_params = jl.combine(params, adapter)
    tx = masked_optimizer(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0)))
    calm, huge = (hostile_gradients(lora_params, 3, fill) for fill in (0.0, 1e30))
    first, second = (run(tx, lora_params, gradients, steps=1)[0] for gradients in (calm, huge))
    assert bits(first) == bits(second)
    moved = jax.tree.map(jnp.subtract, jl.partition(first)[1], adapter)
    assert float(optax.tree.norm(moved)) == pytest.approx(0.1, rel=1e-5)


def test_adam_state_is_at_most_twice_the_adapter_and_float32_on_a_bfloat16_base():
    params, adapter = toy(jnp.bfloat16)
    adapter = jl.Adapter(adapter.pairs, {}, adapter.config)
    lora_params = jl.combine(params, adapter)
    tx = masked_optimizer(optax.adamw(1e-5))
    trained, state = run(tx, lora_params, hostile_gradients(lora_params, 3), steps=50)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}
    assert sum(leaf.nbytes for leaf in moments) == 2 * 4 * adapter.size
    after = jl.partition(trained)[1]
    for old, new in zip(jax.tree.leaves(adapter), jax.tree.leaves(after), strict=True):
        assert new.dtype == jnp.float32 and not np.array_equal(old, new)


def test_the_frozen_update_costs_no_memory_under_jit():
    params = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    init = lambda key: jl.lora_init(key, params, jl.LoraConfig(rank=2))  # noqa: E731
    tree = jl.combine(params, jax.eval_shape(init, jax.random.key(0)))
    tx = masked_optimizer(optax.adamw(1e-4))

    def step(tree, state, gradients):
        updates, state = tx.update(gradients, state, tree)
        return optax.apply_updates(tree, updates), state

    compiled = jax.jit(step, donate_argnums=0).lower(tree, jax.eval_shape(tx.init, tree), tree)
    analysis = compiled.compile().memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < 100_000  # W0 has 4 MB


def test_a_line_search_calls_the_function_of_the_whole_tree():
    params, adapter = toy()
    params = {"up": params["up"]}
    pairs = {"up/kernel": adapter.pairs["up/kernel"]}
    tree = jl.combine(params, jl.Adapter(pairs, {}, adapter.config))
    x = jnp.eye(12)

    def model(params, x):
        return x @ params["up"]["kernel"] + params["up"]["bias"][None]

    loss = lambda tree: jnp.mean(jl.lora_apply(model)(tree, x) ** 2)  # noqa: E731
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    tx = masked_optimizer(optax.chain(optax.sgd(0.1), search))

    @jax.jit
    def step(tree, state):
        value, grad = jax.value_and_grad(loss)(tree)
        updates, state = tx.update(grad, state, tree, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(tree, updates), state

    state, first = tx.init(tree), loss(tree)
    for _ in range(3):
        tree, state = step(tree, state)
    assert loss(tree) < 0.9 * first
    assert bits(jl.partition(tree)[0]) == bits(params)


def test_extra_arguments_reach_the_inner_transformation():
    params, adapter = toy()
    lora_params = jl.combine(params, adapter)
    tx = masked_optimizer(optax.polyak_sgd())
    trained, _ = run(tx, lora_params, hostile_gradients(lora_params, 3), value=jnp.float32(2.0))
    assert bits(jl.partition(trained)[0]) == bits(params)


def test_update_without_params_is_exact_too():
    params, adapter = toy()
    lora_params = jl.combine(params, adapter)
    tx = masked_optimizer(optax.sgd(1e-2))
    step = jax.jit(lambda tree, grads: optax.apply_updates(tree, tx.update(grads, state)[0]))
    state = tx.init(lora_params)
    trained = step(lora_params, hostile_gradients(lora_params, 3, np.nan))
    assert bits(jl.partition(trained)[0]) == bits(params)


def test_complex_leaves_keep_both_signs_of_zero():
    params, adapter = toy()
    params["wave"] = jnp.array([complex(-0.0, -0.0), complex(0.0, -0.0)], jnp.complex64)
    lora_params = jl.combine(params, adapter)
    gradients = jax.tree.map(
        lambda leaf: (
            np.zeros(leaf.shape, jax.dtypes.float0)
            if leaf.dtype in (jnp.int8, jnp.bool_)
            else jnp.ones_like(leaf)
        ),
        lora_params,
    )
    trained, _ = run(masked_optimizer(optax.adam(1e-2)), lora_params, gradients)
    assert bits(jl.partition(trained)[0]) == bits(params)


# -----------------------------------------------------------------------------------------------
# The mask
# -----------------------------------------------------------------------------------------------


def test_mask_is_true_at_factors_and_whole_leaves_only():
    params, adapter = toy()
    lora_params = jl.combine(params, adapter)
    mask = trainable_mask(lora_params)
    assert jax.tree.structure(mask) == jax.tree.structure(lora_params)
    base, trained = jl.partition(mask)
    assert not any(jax.tree.leaves(base)) and all(jax.tree.leaves(trained))
    assert sum(jax.tree.leaves(mask)) == 7  # three pairs and one whole leaf


def test_mask_leaves_the_dropout_key_out():
    params = {"kernel": jnp.ones((3, 4))}
    config = jl.LoraConfig(rank=2, dropout=0.1)
    tree = jl.combine(params, jl.lora_init(jax.random.key(0), params, config))
    mask = trainable_mask(jl.dropout(tree, jax.random.key(1)))
    assert isinstance(mask["kernel"], LoraWeight) and mask["kernel"].dropout_key is False


def test_mask_of_an_adapter_alone_is_all_true():
    _, adapter = toy()
    mask = trainable_mask(adapter)
    assert all(jax.tree.leaves(mask))
    assert jax.tree.structure(mask) == jax.tree.structure(adapter)


def test_mask_works_with_optax_masked_itself():
    params, adapter = toy()
    lora_params = jl.combine(params, adapter)
    state = optax.masked(optax.adam(1e-3), trainable_mask(lora_params)).init(lora_params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 1 + 2 * adapter.size


def test_a_tree_without_an_adapter_is_refused():
    params, _ = toy()
    with pytest.raises(StructureError, match="without any LoraWeight[\\s\\S]*jl.combine"):
        trainable_mask(params)
    with pytest.raises(StructureError, match="without any LoraWeight"):
        masked_optimizer(optax.adam(1e-3)).init(params)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ConfigError, match=r"masked_optimizer: tx\s+got:\s+0.0001 of type float"):
        masked_optimizer(1e-4)


# -----------------------------------------------------------------------------------------------
# LoRA+
# -----------------------------------------------------------------------------------------------


def test_lora_plus_multiplies_the_learning_rate_of_b_alone():
    params, adapter = toy()[:2]
    combined = jl.combine(params, adapter)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), adapter)
    plain, faster = (
        tx.update(ones, tx.init(adapter), adapter)[0]
        for tx in (optax.adamw(0.1), jl.lora_plus(optax.adamw(0.1), 4.0))
    )
    for path, pair in faster.pairs.items():
        np.testing.assert_array_equal(pair.a, plain.pairs[path].a)
        np.testing.assert_array_equal(pair.b, 4.0 * plain.pairs[path].b)
    # And within the optimizer of a whole tree.
    masked = masked_optimizer(jl.lora_plus(optax.sgd(1.0), 4.0))
    gradients = jax.tree.map(np.ones_like, jl.combine(params, ones))
    updates, _ = masked.update(gradients, masked.init(combined), combined)
    _, moved = jl.partition(updates)
    assert all(np.all(pair.b == -4.0) and np.all(pair.a == -1.0) for pair in moved.pairs.values())


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan"), float("inf"), "4", True])
def test_lora_plus_refuses_a_ratio_that_is_none(ratio):
    with pytest.raises(ConfigError, match="lora_plus: ratio"):
        jl.lora_plus(optax.sgd(1.0), ratio)
