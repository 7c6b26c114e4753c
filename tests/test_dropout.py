import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_lora as jl
from tests.lora_cases import assert_bitwise, merged_tree, random_tree, randomized

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


# -----------------------------------------------------------------------------------------------
# Inside shard_map
# -----------------------------------------------------------------------------------------------


def sharded(fn, specs, out_spec, check):
    """`fn(x, kernel)` on two by four devices."""
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def apply(p, x):
        return jax.shard_map(
            fn, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=check
        )(x, p["kernel"])  # fmt: skip

    return apply


def of_ones():
    """A pair that sums its input: equal rows of x, dropped alike, give equal numbers."""
    tree = {"kernel": jnp.zeros((32, 16))}
    adapter = adapted(tree)
    return tree, jax.tree.map(jnp.ones_like, adapter)


def run_dropped(apply, tree, adapter, x=X, seed=1):
    combined = jl.dropout(jl.combine(tree, adapter), jax.random.key(seed))
    return jl.lora_apply(apply, on_materialize="error")(combined, x)


check_or_not = pytest.mark.parametrize(
    "check",
    [pytest.param(True, id="checked"), pytest.param(False, id="unchecked", marks=pytest.mark.slow)],
)


@check_or_not
def test_shards_with_rows_of_their_own_drop_inputs_of_their_own(check):
    tree, adapter = single()
    apply = sharded(jnp.matmul, (P(("d", "m")), P()), P(("d", "m")), check)
    out = run_dropped(apply, tree, adapter)
    assert len(np.unique(np.asarray(out), axis=0)) == 64


@check_or_not
def test_shards_with_inputs_of_their_own_drop_them_each_for_itself(check):
    tree, adapter = of_ones()
    partial = lambda x, w: (x @ w)[None]  # noqa: E731
    apply = sharded(partial, (P(None, "m"), P("m")), P("m"), check)
    counts = run_dropped(apply, tree, adapter)[:, :, 0]  # (shards, tokens): how many are kept
    assert len(np.unique(np.asarray(counts), axis=0)) == 4


@check_or_not
@pytest.mark.parametrize("x_spec", [P(), P("d")], ids=["the same rows", "rows of their own"])
def test_shards_with_outputs_of_their_own_drop_the_same_inputs(check, x_spec):
    tree, adapter = of_ones()
    spec = P(*x_spec, None) if x_spec else P(None, None)
    apply = sharded(jnp.matmul, (spec, P(None, "m")), P(spec[0], "m"), check)
    out = np.asarray(run_dropped(apply, tree, adapter))  # (tokens, out): the same in all columns
    assert np.array_equal(out, np.broadcast_to(out[:, :1], out.shape))
    assert len(np.unique(out)) > 3


@pytest.mark.parametrize("collect", ["sum", "gather"])
def test_data_that_became_the_same_are_dropped_alike(collect):
    def fn(x, w):
        same = lax.psum(x, "d") if collect == "sum" else lax.all_gather(x, "d", tiled=True)
        return same @ w

    tree, adapter = single()
    x = jax.random.normal(jax.random.key(0), X.shape)
    out = run_dropped(sharded(fn, (P("d"), P()), P(), False), tree, adapter, x)
    first, *others = [np.asarray(shard.data) for shard in out.addressable_shards]
    assert len(others) == 7 and all(np.array_equal(first, other) for other in others)


@check_or_not
def test_inner_programs_of_shards_drop_inputs_of_their_own(check):
    def fn(x, w):
        product = jax.checkpoint(jax.jit(lambda h: jax.nn.relu(h @ w)))
        return lax.scan(lambda total, _: (total + product(x), None), 0 * (x @ w), None, length=2)[0]

    tree, adapter = single()
    apply = sharded(fn, (P("d"), P()), P("d"), check)
    out = run_dropped(jax.jit(apply), tree, adapter)
    assert len(np.unique(np.asarray(out), axis=0)) == 64


@check_or_not
def test_in_shards_the_mean_of_output_and_gradient_is_that_of_merged_weights(check):
    tree = {"kernel": random_tree((32, 16))}
    adapter, tokens = adapted(tree), jnp.ones((16_000, 32))
    apply = sharded(jnp.matmul, (P(("d", "m")), P()), P(("d", "m")), check)

    def mean(run):
        summed = lambda each, x: run(each, x).mean(0) @ jnp.arange(16.0)  # noqa: E731
        return jax.jit(jax.value_and_grad(summed))(adapter, tokens)

    ours = mean(lambda each, x: run_dropped(apply, tree, each, x))
    theirs = mean(lambda each, x: x @ merged_tree(tree, each)["kernel"])
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, want, atol=0.05 * float(jnp.abs(want).max()))


@check_or_not
def test_remat_in_shards_drops_the_same_inputs_again(check):
    tree, adapter = single()
    fn = jax.checkpoint(lambda x, w: jnp.sin(x @ w))
    apply = sharded(fn, (P("d"), P(None, "m")), P("d", "m"), check)
    loss = lambda each: (run_dropped(apply, tree, each) ** 2).sum()  # noqa: E731
    direction = randomized(adapter, 3)
    forward = jax.jit(lambda a: jax.jvp(loss, (a,), (direction,))[1])(adapter)
    products = jax.tree.map(lambda g, t: (g * t).sum(), jax.jit(jax.grad(loss))(adapter), direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), forward, rtol=1e-3)


@check_or_not
def test_inside_shard_map_the_key_may_be_the_shards_own(check):
    tree, adapter = single()
    run = jl.lora_apply(lambda p, x: x @ p["kernel"])

    def step(adapter, x):
        key = jax.random.fold_in(jax.random.key(1), lax.axis_index("d"))
        return run(jl.dropout(jl.combine(tree, adapter), key), x)

    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"), check_vma=check
    )
    assert len(np.unique(np.asarray(jax.jit(mapped)(adapter, X)), axis=0)) == 64
