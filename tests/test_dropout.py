import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from tests.lora_cases import assert_bitwise, random_tree, randomized

X = jnp.ones((64, 32))


def adapted(tree, rate=0.5, **kernels):
    config = jl.LoraConfig(rank=32, dropout=rate, targets="*")
    return randomized(jl.lora_init(jax.random.key(0), tree, config, kernels=kernels or None))


def single():
    tree = {"kernel": jnp.zeros((32, 16))}
    return tree, adapted(tree)


def test_dropout_is_off_without_a_key():
    tree, adapter = single()
    run = jl.lora_apply(lambda p, x: x @ p["kernel"])
    assert_bitwise(run(jl.combine(tree, adapter), X), run(jl.combine(tree, adapter), X))
    rows = run(jl.combine(tree, adapter), X)
    assert np.allclose(rows, rows[:1])


def test_every_token_and_every_key_drops_other_inputs():
    tree, adapter = single()
    run = jl.lora_apply(lambda p, x: x @ p["kernel"])
    one = run(jl.dropout(jl.combine(tree, adapter), jax.random.key(1)), X)
    other = run(jl.dropout(jl.combine(tree, adapter), jax.random.key(2)), X)
    assert len(np.unique(np.asarray(one), axis=0)) == 64
    assert not np.allclose(one, other)


def test_the_mean_is_the_output_without_dropout():
    tree, adapter = single()
    run = jl.lora_apply(lambda p, x: x @ p["kernel"])
    tokens = jnp.ones((20_000, 32))
    dropped = run(jl.dropout(jl.combine(tree, adapter), jax.random.key(1)), tokens).mean(0)
    plain = run(jl.combine(tree, adapter), tokens)[0]
    np.testing.assert_allclose(dropped, plain, atol=0.05 * float(jnp.abs(plain).max()))


def test_w0_sees_its_input_whole():
    tree = {"kernel": random_tree((32, 16))}
    adapter = jl.lora_init(jax.random.key(0), tree, jl.LoraConfig(rank=4, dropout=0.5))
    run = jl.lora_apply(lambda p, x: x @ p["kernel"])
    combined = jl.dropout(jl.combine(tree, adapter), jax.random.key(1))
    assert_bitwise(run(combined, X), X @ tree["kernel"])  # b is zero


def layers(p, x):
    return lax.scan(lambda h, w: (h, x @ w), 0.0, p["kernel"])[1]


def test_layers_of_a_scan_drop_inputs_of_their_own():
    tree = {"kernel": jnp.zeros((3, 32, 16))}
    kernels = jl.find_kernels(layers, tree, X)
    adapter = adapted(tree, **kernels)
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), adapter)
    run = jl.lora_apply(layers)
    out = np.asarray(run(jl.dropout(jl.combine(tree, same), jax.random.key(1)), X))
    assert not np.allclose(out[0], out[1]) and not np.allclose(out[1], out[2])


@pytest.mark.parametrize("loop", ["scan", "while", "python", "jit"])
def test_a_weight_used_again_drops_other_inputs(loop):
    product = jax.jit(lambda w: X @ w)

    def apply(p):
        w = p["kernel"]
        if loop == "scan":
            return lax.scan(lambda c, _: (c, X @ w), 0.0, None, length=2)[1]
        if loop == "while":
            step = lambda i, out: out.at[i].set(X @ w)  # noqa: E731
            return lax.fori_loop(0, jnp.int32(2), step, jnp.zeros((2, 64, 16)))
        call = product if loop == "jit" else lambda w: X @ w
        return jnp.stack([call(w), call(w)])

    tree, adapter = single()
    out = jl.lora_apply(apply)(jl.dropout(jl.combine(tree, adapter), jax.random.key(1)))
    assert not np.allclose(out[0], out[1])


def test_remat_drops_the_same_inputs_again():
    tree, adapter = single()
    apply = jax.checkpoint(lambda p: jnp.sin(X @ p["kernel"]))

    def loss(a):
        dropped = jl.dropout(jl.combine(tree, a), jax.random.key(1))
        return (jl.lora_apply(apply)(dropped) ** 2).sum()

    # Forward mode runs the program once; reverse mode replays it. They agree if the masks do.
    direction = randomized(adapter, 3)
    forward = jax.jvp(loss, (adapter,), (direction,))[1]
    products = jax.tree.map(lambda g, t: (g * t).sum(), jax.grad(loss)(adapter), direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), forward, rtol=1e-3)


def test_a_step_with_dropout_compiles_once():
    tree, adapter = single()
    traces = []

    @jax.jit
    def step(adapter, key):
        traces.append(None)
        return jl.lora_apply(lambda p, x: x @ p["kernel"])(
            jl.dropout(jl.combine(tree, adapter), key), X
        )

    for seed in range(3):
        step(adapter, jax.random.key(seed))
    assert len(traces) == 1


def test_a_rate_of_zero_changes_nothing_and_a_plain_tree_is_refused():
    tree = {"kernel": jnp.zeros((32, 16))}
    combined = jl.combine(tree, jl.lora_init(jax.random.key(0), tree, jl.LoraConfig(rank=4)))
    assert jax.tree.structure(jl.dropout(combined, jax.random.key(0))) == jax.tree.structure(
        combined
    )
    with pytest.raises(jl.errors.StructureError, match="dropout"):
        jl.dropout(tree, jax.random.key(0))
