import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.errors import CheckpointError, ConfigError, NoMatchError
from tests.checkpoint.test_adapter_checkpoint import reseal
from tests.lora_cases import assert_bitwise, assert_close, merged_tree, random_tree, randomized

X = random_tree((3, 6), 9)


def model(p, x):  # (tokens, d) -> (tokens, d)
    def layer(x, kernels):
        q, v = kernels
        return x + jnp.tanh(x @ q) @ v, None

    layers = p["params"]["layers"]
    x, _ = jax.lax.scan(layer, x, (layers["attn"]["q"]["kernel"], layers["mlp"]["v"]["kernel"]))
    return jnp.tanh(x @ p["params"]["out"]["kernel"]) * 2.0 @ p["params"]["last"]


def tree():
    return {
        "params": random_tree(
            {
                "layers": {
                    "attn": {"q": {"kernel": (4, 6, 5)}},
                    "mlp": {"v": {"kernel": (4, 5, 6)}},
                },
                "out": {"kernel": (6, 6)},
                "last": (6, 2),
            }
        )
    }


Q, V = "params/layers/attn/q/kernel", "params/layers/mlp/v/kernel"


def init(**config):
    kernels = jl.find_kernels(model, tree(), X)
    config.setdefault("rank", 2)
    config.setdefault("alpha", 8.0)
    return jl.lora_init(jax.random.key(0), tree(), jl.LoraConfig(**config), kernels=kernels)


@jax.jit
def apply(adapter):
    return jl.lora_apply(model, on_materialize="error")(jl.combine(tree(), adapter), X)


def test_a_pattern_may_name_one_layer_of_a_stack():
    adapter = init(
        rank_pattern={"layers/3/attn/q": 5, "layers/[0-1]/*": 1},
        alpha_pattern={"layers/2/mlp": 4.0},
    )
    q, v = adapter.pairs[Q], adapter.pairs[V]
    assert (q.ranks, q.rank, q.scale) == ((1, 1, 2, 5), 5, (8.0, 8.0, 4.0, 1.6))
    assert (v.ranks, v.rank, v.scale) == ((1, 1, 2, 2), 2, (8.0, 8.0, 2.0, 4.0))
    out = adapter.pairs["params/out/kernel"]
    assert (out.ranks, out.rank, out.scale) == (None, 2, 4.0)


def test_a_pattern_that_names_the_stack_is_for_all_its_layers_and_the_first_match_wins():
    adapter = init(rank_pattern={"layers/1": 4, "attn": 3})
    assert adapter.pairs[Q].ranks == (3, 4, 3, 3)
    assert init(rank_pattern={"attn": 3, "layers/1": 4}).pairs[Q].ranks is None
    assert init(rank_pattern={"layers/*": 3}).pairs[Q].rank == 3


def test_factors_are_padded_with_zeros_to_the_largest_rank():
    q = jax.device_get(init(rank_pattern={"layers/3/attn/q": 5, "layers/0": 1})).pairs[Q]
    assert q.a.shape == (4, 6, 5) and q.b.shape == (4, 5, 5)
    for layer, rank in enumerate(q.ranks):
        assert q.a[layer, :, :rank].all() and not q.a[layer, :, rank:].any()


def test_layers_of_equal_rank_start_as_they_would_without_patterns():
    adapter = init(rank=4, layers=[0, 2], rank_pattern={"layers/2/attn": 1})
    plain = init(rank=4)
    adapter, plain = jax.device_get((adapter, plain))
    assert_bitwise(adapter.pairs[Q].a[0], plain.pairs[Q].a[0])
    assert_bitwise(adapter.pairs[Q].a[2, :, :1], plain.pairs[Q].a[2, :, :1])
    assert_bitwise(adapter.pairs["params/out/kernel"], plain.pairs["params/out/kernel"])
    everywhere = init(rank=4, layers=range(4))
    assert_bitwise(everywhere.pairs[Q], plain.pairs[Q])


def test_under_jit_the_padded_factors_are_the_same():
    settings = jl.LoraConfig(rank=2, rank_pattern={"layers/3": 3}, layers=[1, 3])
    kernels = jl.find_kernels(model, tree(), X)
    make = lambda key: jl.lora_init(key, tree(), settings, kernels=kernels)  # noqa: E731
    assert_bitwise(jax.jit(make)(jax.random.key(0)), make(jax.random.key(0)))


def test_layers_that_are_left_out_have_no_update():
    adapter = init(layers=[1, 3])
    q = adapter.pairs[Q]
    assert (q.ranks, q.scale) == ((0, 2, 0, 2), 4.0)
    adapter = padded(randomized(adapter))
    want = jax.jit(lambda adapter: model(merged_tree(tree(), adapter), X))(adapter)
    assert_close(apply(adapter), want, 1e-5)
    merged = jax.jit(jl.merge)(tree(), adapter)["params"]["layers"]["attn"]["q"]["kernel"]
    base = tree()["params"]["layers"]["attn"]["q"]["kernel"]
    merged, base = np.asarray(merged), np.asarray(base)
    assert_bitwise(merged[[0, 2]], base[[0, 2]])
    assert (merged[1] != base[1]).any()


def padded(adapter):
    """The same adapter with zeros where `lora_init` has them."""

    def each(pair):
        if pair.ranks is None:
            return pair
        used = np.float32(np.arange(pair.rank) < np.asarray(pair.ranks)[..., None])
        a, b = np.asarray(pair.a) * used[:, None, :], np.asarray(pair.b) * used[:, :, None]
        return jl.LoraPair(
            a, b, pair.in_axes, pair.out_axes, pair.stack_axes, pair.scale, pair.ranks
        )

    return jl.Adapter(
        {path: each(pair) for path, pair in adapter.pairs.items()}, adapter.whole, adapter.config
    )


def test_padding_is_zero_to_the_bit_after_twenty_steps_with_weight_decay():
    adapter = init(
        rank_pattern={"layers/1/attn": 5}, layers=[0, 1, 3], alpha_pattern={"layers/3": 2.0}
    )
    start = adapter
    tx = optax.adamw(0.05, weight_decay=0.1)
    state = jax.jit(tx.init)(adapter)

    @jax.jit
    def step(adapter, state):
        grads = jax.grad(lambda each: jnp.sum((apply(each) - 1.0) ** 2))(adapter)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to its step count
            updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    for _ in range(20):
        adapter, state = step(adapter, state)
    start, adapter = jax.device_get((start, adapter))
    for path in (Q, V):
        pair, before = adapter.pairs[path], start.pairs[path]
        for layer, rank in enumerate(pair.ranks):
            padding = np.concatenate(
                [np.ravel(pair.a[layer, :, rank:]), np.ravel(pair.b[layer, rank:])]
            )
            assert padding.tobytes() == np.zeros_like(padding).tobytes()
            assert rank == 0 or (pair.a[layer, :, :rank] != before.a[layer, :, :rank]).all()
            assert pair.b[layer, :rank].all()


def test_a_stack_of_which_no_layer_is_adapted_gets_no_pair():
    def two_depths(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["encoder"])
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["decoder"])
        return x * 2.0

    params = random_tree({"encoder": (2, 6, 6), "decoder": (4, 6, 6)})
    kernels = jl.find_kernels(two_depths, params, X)
    config = jl.LoraConfig(rank=2, layers=[3], targets=["encoder", "decoder"])
    adapter = jl.lora_init(jax.random.key(0), params, config, kernels=kernels)
    assert list(adapter.pairs) == ["decoder"]


def test_experts_within_layers_have_their_layers_rank():
    def batched(p, x):
        step = lambda x, w: (jnp.tanh(jnp.einsum("etd,edk->etk", x, w)), None)  # noqa: E731
        return jax.lax.scan(step, x, p["layers"])[0]

    params, x = random_tree({"layers": (2, 3, 6, 6)}), random_tree((3, 4, 6))
    kernels = jl.find_kernels(batched, params, x)
    assert kernels["layers"].stack_axes == (0, 1)
    config = jl.LoraConfig(rank=2, targets="layers", rank_pattern={"layers/1": 1})
    pair = jl.lora_init(jax.random.key(0), params, config, kernels=kernels).pairs["layers"]
    assert pair.ranks == ((2, 2, 2), (1, 1, 1))
    assert pair.scale == ((8.0, 8.0, 8.0), (16.0, 16.0, 16.0))
    assert pair.size == 3 * (2 + 1) * 12


def test_sizes_leave_padding_out():
    adapter = init(rank_pattern={"layers/3/attn": 5}, layers=[2, 3])
    assert adapter.pairs[Q].size == (2 + 5) * (6 + 5)
    assert adapter.size == (2 + 5) * 11 + (2 + 2) * 11 + 2 * (6 + 6) + 0
    shown = jl.summary(tree(), adapter)
    assert shown.trainable == adapter.size
    row = next(row for row in shown.rows if row.path == Q)
    assert (row.rank, row.ranks, row.trainable) == (5, (0, 5), 77)
    assert row.scale == pytest.approx((1.6, 4.0))
    assert "0..5" in str(shown)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            {"rank_pattern": {"layers/7/attn": 3}},
            NoMatchError,
            "(?s)rank_pattern='layers/7/attn'.*params/layers/./attn/q/kernel",
        ),
        (
            {"layers": [0], "alpha_pattern": {"layers/1": 3.0}},
            NoMatchError,
            "(?s)alpha_pattern='layers/1'",
        ),
        ({"layers": [0, 4, 9]}, NoMatchError, "(?s)no layer 4, 9; the largest stack has 4"),
        ({"layers": [0], "targets": "out"}, NoMatchError, "(?s)layers=.*stacked by layer"),
        ({"rank_pattern": {"layers/3": 10**9}}, ConfigError, "(?s)rank of params/layers.*at most"),
        ({"layers": []}, ConfigError, "(?s)LoraConfig: layers.*list of indices from 0"),
        ({"layers": [-1]}, ConfigError, "LoraConfig: layers"),
        ({"layers": [True]}, ConfigError, "LoraConfig: layers"),
        ({"layers": "0"}, ConfigError, "LoraConfig: layers"),
    ],
)
def test_layers_that_cannot_be_meant_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        init(**config)


def test_json_brings_layers_back():
    config = jl.LoraConfig(layers=[3, 1, 1], rank_pattern={"layers/3": 2})
    assert config.layers == (1, 3)
    assert jl.LoraConfig.from_json(config.to_json()) == config
    assert jl.LoraConfig.from_json(jl.LoraConfig().to_json()).layers is None


def test_a_checkpoint_brings_ranks_and_scales_back(tmp_path):
    adapter = init(
        rank_pattern={"layers/3": 5}, layers=[0, 2, 3], alpha_pattern={"layers/2/mlp": 1.0}
    )
    jl.save_adapter(tmp_path / "adapter", adapter, base=tree())
    again = jl.load_adapter(tmp_path / "adapter", base=tree())
    assert_bitwise(again, adapter)  # the same treedef: config, ranks and scales are in it
    assert again.pairs[Q].ranks == (2, 0, 2, 5)


@pytest.mark.parametrize("ranks", [[1, 2], [1, 2, 3, 99], [1, 2, 3, -1], [1, 2, 3, 0.5]])
def test_a_manifest_whose_ranks_fit_no_factors_is_refused(tmp_path, ranks):
    jl.save_adapter(tmp_path / "adapter", init(rank_pattern={"layers/3": 5}))
    reseal(tmp_path / "adapter", lambda values: values["pairs"][Q].update(ranks=ranks))
    with pytest.raises(CheckpointError, match="ranks must be"):
        jl.load_adapter(tmp_path / "adapter")


def test_a_manifest_whose_ranks_are_not_a_list_is_refused(tmp_path):
    jl.save_adapter(tmp_path / "adapter", init(rank_pattern={"layers/3": 5}))
    reseal(tmp_path / "adapter", lambda values: values["pairs"][Q].update(ranks=3))
    with pytest.raises(CheckpointError, match=r"\.ranks = 3: expected a list"):
        jl.load_adapter(tmp_path / "adapter")


def test_combine_and_partition_carry_ranks():
    adapter = init(layers=[1])
    assert jl.partition(jl.combine(tree(), adapter))[1].pairs[Q].ranks == (0, 2, 0, 0)
