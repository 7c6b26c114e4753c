"""find_kernels reports the matrices that cannot be adapted, with reasons, and ignores state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_lora as jl
from jax_lora.errors import NoMatchError, SkippedKernelWarning
from tests.lora_cases import random_tree

X = random_tree((2, 4), 1)
SQUARE = random_tree((4, 4), 2)


def init(fn, tree, *args, targets="all-linear", **config):
    kernels = jl.find_kernels(fn, tree, *args)
    settings = jl.LoraConfig(rank=2, targets=targets, **config)
    return jl.lora_init(jax.random.key(0), tree, settings, kernels=kernels)


def after_tanh(p, x):
    return jnp.tanh(x @ jnp.tanh(p["odd"])) @ p["plain"] @ p["head"]


TREE = {"odd": SQUARE, "plain": SQUARE, "head": SQUARE}


def test_a_kernel_behind_an_operation_without_a_rule_is_skipped_with_the_line():
    kernels = jl.find_kernels(after_tanh, TREE, X)
    assert {*kernels} == {"plain", "head"}
    assert kernels.skipped["odd"].startswith(
        f"the operation tanh has no low-rank rule at {__file__}:"
    )


def test_a_skipped_target_is_named_in_one_warning():
    with pytest.warns(SkippedKernelWarning, match="odd: the operation tanh") as caught:
        adapter = init(after_tanh, TREE, X)
    assert len(caught) == 1 and {*adapter.pairs} == {"plain"}


@pytest.mark.parametrize("targets", [["[op]*", "plain"], "*"])
def test_a_skipped_leaf_that_a_pattern_names_is_warned_of(targets):
    with pytest.warns(SkippedKernelWarning, match="odd"):
        init(after_tanh, TREE, X, targets=targets)


def test_a_pattern_that_names_a_skipped_leaf_alone_is_an_error_with_the_reason():
    with pytest.raises(NoMatchError, match="odd: the operation tanh"):
        init(after_tanh, TREE, X, targets="odd")


def test_an_excluded_leaf_is_not_warned_of():
    init(after_tanh, TREE, X, exclude=["head"], modules_to_save=["odd"])


def test_a_table_that_is_only_added_is_skipped_without_a_warning():
    tree = {"position": random_tree((3, 4)), "up": SQUARE, "head": SQUARE}
    fn = lambda p, x: jnp.tanh((x + p["position"][None]) @ p["up"]) @ p["head"]  # noqa: E731
    for rows in (1, 2):
        x = jnp.ones((rows, 3, 4))
        assert "position" in jl.find_kernels(fn, tree, x).skipped
        assert {*init(fn, tree, x).pairs} == {"up"}


def test_a_kernel_to_which_smaller_data_is_added_stays_a_kernel():
    tree = {"left": SQUARE, "right": SQUARE}
    fn = lambda p, x: p["left"] @ (p["right"] - x[:, None])  # noqa: E731
    assert {*jl.find_kernels(fn, tree, X[0])} == {"left", "right"}


def test_a_bias_of_two_axes_that_a_pattern_matches_is_not_warned_of():
    dense = nn.DenseGeneral((2, 3), name="query")
    variables = dense.init(jax.random.key(0), X)
    kernels = jl.find_kernels(dense.apply, variables, X)
    assert "params/bias" in kernels.skipped and "params/bias" in kernels.added
    assert {*init(dense.apply, variables, X, targets="params/*").pairs} == {"params/kernel"}


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int8])
def test_a_kernel_of_a_type_that_no_adapter_has_is_named(dtype):
    tree = {"odd": SQUARE.astype(dtype), "up": SQUARE, "head": SQUARE}

    def fn(p, x):
        size = jnp.abs(x.astype(dtype) @ p["odd"]).astype(jnp.float32)
        return jnp.tanh(size @ p["up"]) @ p["head"]

    kernels = jl.find_kernels(fn, tree, X)
    assert {*kernels} == {"up", "head"}
    assert str(jnp.dtype(dtype)) in kernels.skipped["odd"]
    with pytest.warns(SkippedKernelWarning, match=str(jnp.dtype(dtype))):
        assert {*init(fn, tree, X).pairs} == {"up"}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn])
def test_a_kernel_of_any_floating_type_is_found(dtype):
    tree = {"kernel": SQUARE.astype(dtype)}
    fn = lambda p, x: jnp.tanh(x @ p["kernel"].astype(jnp.float32))  # noqa: E731
    assert {*jl.find_kernels(fn, tree, X)} == {"kernel"}


def test_a_use_is_counted_once():
    """Rows of two tables are added, and a product is added to the sum."""
    tree = {"words": random_tree((7, 4)), "places": random_tree((5, 4)), "up": SQUARE}
    fn = lambda p, ids: p["words"][ids] + p["places"][ids] + jnp.tanh(p["words"][ids]) @ p["up"]  # noqa: E731
    kernels = jl.find_kernels(fn, tree, jnp.array([0, 2]))
    assert {path: kernel.uses for path, kernel in kernels.items()} == {
        "places": 1, "up": 1, "words": 2,
    }  # fmt: skip


# -----------------------------------------------------------------------------------------------
# Only parameters
# -----------------------------------------------------------------------------------------------


class Normalized(nn.Module):
    """A dense layer whose kernel a power iteration divides by its norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.SpectralNorm(nn.Dense(8, name="body"))(x, update_stats=True)
        return nn.Dense(3, name="head")(nn.relu(x))


class FilterBank(nn.Module):
    @nn.compact
    def __call__(self, x):
        bank = self.variable("constants", "bank", lambda: jnp.ones((4, 6)))
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(5, name="body")(x @ bank.value)))


@pytest.mark.parametrize(
    ("model", "mutable"), [(Normalized(), ["batch_stats"]), (FilterBank(), [])]
)
def test_only_the_collection_params_is_adapted(model, mutable):
    variables = model.init(jax.random.key(0), X)
    fn = lambda v, x: model.apply(v, x, mutable=mutable)  # noqa: E731
    assert {*init(fn, variables, X).pairs} == {"params/body/kernel"}


def test_a_matrix_of_another_collection_is_skipped_by_its_collection():
    model = FilterBank()
    kernels = jl.find_kernels(model.apply, model.init(jax.random.key(0), X), X)
    assert "the collection 'constants'" in kernels.skipped["constants/bank"]


def test_without_kernels_only_parameters_are_taken_by_their_names():
    tree = {"params": {"kernel": SQUARE}, "cache": {"kernel": SQUARE}}
    adapter = jl.lora_init(jax.random.key(0), tree, jl.LoraConfig(rank=2))
    assert {*adapter.pairs} == {"params/kernel"}


def test_collections_count_inside_a_tree_of_models():
    model = FilterBank()
    variables = {"first": model.init(jax.random.key(0), X)}
    fn = lambda v, x: model.apply(v["first"], x)  # noqa: E731
    assert {*init(fn, variables, X).pairs} == {"first/params/body/kernel"}


class Cached(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.table = nnx.BatchStat(jnp.ones((4, 4)))

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x @ self.table[...])))


def test_only_variables_of_type_param_are_adapted():
    graph, state = nnx.split(Cached(nnx.Rngs(0)))
    fn = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    kernels = jl.find_kernels(fn, state, X)
    assert {*kernels} == {"body/kernel", "head/kernel"}
    assert "nnx.BatchStat" in kernels.skipped["table"]


# -----------------------------------------------------------------------------------------------
# What is found does not depend on what else is returned
# -----------------------------------------------------------------------------------------------


def decoder(p, ids):
    """Two layers of attention and a head; all that a caller could want returned."""
    x, seen = p["embed"][ids], []
    for q, k, v, o in (("q0", "k0", "v0", "o0"), ("q1", "k1", "v1", "o1")):
        keys, values = x @ p[k], x @ p[v]
        weights = jax.nn.softmax(x @ p[q] @ keys.swapaxes(-1, -2))
        out = weights @ values @ p[o]
        seen += [keys, values, out]
        x = x + out
    logits = x @ p["head"]
    return {"logits": logits, "seen": seen, "hidden": x, "probabilities": jax.nn.softmax(logits)}


DECODER = random_tree(
    {"embed": (7, 4), "head": (4, 7)} | {f"{name}{i}": (4, 4) for name in "qkvo" for i in (0, 1)}
)
RETURNS = {
    "logits": lambda out: out["logits"],
    "a cache": lambda out: (out["logits"], out["seen"]),
    "hidden states": lambda out: (out["hidden"], out["logits"]),
    "captured intermediates": lambda out: out,
    "a loss beside the logits": lambda out: (
        -(jnp.log(out["probabilities"]) * jax.nn.one_hot(jnp.array([[1, 2, 3]]), 7)).sum(),
        out["logits"],
    ),
}


@pytest.mark.parametrize("returns", RETURNS)
def test_the_output_head_is_the_same_whatever_else_is_returned(returns):
    fn = lambda p, ids: RETURNS[returns](decoder(p, ids))  # noqa: E731
    ids = jnp.array([[0, 1, 2]])
    kernels = jl.find_kernels(fn, DECODER, ids)
    assert [path for path, kernel in kernels.items() if kernel.is_output_head] == ["head"]
    assert {*init(fn, DECODER, ids).pairs} == {*DECODER} - {"embed", "head"}


def test_a_captured_layer_of_a_model_without_a_head_is_no_head():
    def fn(p, x):
        out = jnp.tanh(x @ p["up"]) @ p["down"]
        x = x @ p["in"] + out
        return {"hidden": jax.nn.relu(x), "captured": out}

    tree = {name: SQUARE for name in ("up", "down", "in")}
    kernels = jl.find_kernels(fn, tree, X)
    assert not kernels["down"].is_output_head


# -----------------------------------------------------------------------------------------------
# Ways of a kernel that both interpretations follow
# -----------------------------------------------------------------------------------------------


def barrier(p, x):
    a, b = lax.optimization_barrier((p["a"], p["b"]))
    return jnp.tanh(jnp.tanh(x @ a) @ b) @ p["head"]


def handed_out_by_a_scan(p, x):
    _, kernels = lax.scan(lambda c, k: (c, k * 2.0), 0.0, p["a"])
    for kernel in kernels:
        x = jnp.tanh(x @ kernel)
    return jnp.tanh(x @ p["b"]) @ p["head"]


MESH = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def collected(p, x):
    multiply = jax.shard_map(
        lambda w, x: x @ lax.all_gather(w, "d", axis=0, tiled=True),
        mesh=MESH, in_specs=(P("d"), P("d")), out_specs=P("d"),
    )  # fmt: skip
    return jnp.tanh(jnp.tanh(multiply(p["a"], x)) @ p["b"]) @ p["head"]


@pytest.mark.parametrize("fn", [barrier, handed_out_by_a_scan, collected])
def test_a_kernel_that_is_carried_is_found(fn):
    stack = fn is handed_out_by_a_scan
    tree = {"a": jnp.stack([SQUARE] * 3) if stack else SQUARE, "b": SQUARE, "head": SQUARE}
    adapter = init(fn, tree, X)
    assert {*adapter.pairs} == {"a", "b"}
    jl.lora_apply(fn, on_materialize="error")(jl.combine(tree, adapter), X)
