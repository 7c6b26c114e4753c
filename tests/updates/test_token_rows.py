"""Trained rows of an embedding table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.errors import BaseMismatchError, CheckpointError, MergeError, StructureError
from jax_lora.optimizers import trainable_mask
from tests.checkpoint.test_adapter_checkpoint import reseal
from tests.lora_cases import assert_bitwise, assert_close, merged_tree, random_tree, randomized

IDS = jnp.array([[0, 3, 6], [1, 3, 5]])
CONFIG = jl.LoraConfig(rank=2)


def model(p, ids):  # tied: the table is looked up and is the head
    x = jnp.tanh(p["embed"][ids] @ p["dense"]["kernel"])
    return x @ p["embed"].T


def toy(dtype="float32"):
    tree = random_tree({"embed": (7, 4), "dense": {"kernel": (4, 4)}}, dtype=dtype)
    pairs = jl.lora_init(jax.random.key(0), tree, CONFIG).pairs
    rows = jl.TokenRows.of(tree["embed"], [6, 3])
    return tree, jl.Adapter(pairs, {}, CONFIG, {"embed": rows})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_start_as_the_tables_own(dtype):
    tree, adapter = toy(dtype)
    run = jax.jit(jl.lora_apply(model, on_materialize="error"))
    assert_bitwise(run(jl.combine(tree, adapter), IDS), jax.jit(model)(tree, IDS))
    assert adapter.rows["embed"].values.dtype == jnp.float32


def test_trained_rows_take_the_place_of_the_tables_at_both_ends():
    tree, adapter = toy()
    adapter = randomized(adapter)
    values = adapter.rows["embed"].values
    embed = np.asarray(tree["embed"]).copy()
    embed[6], embed[3] = values[0], values[1]
    np.testing.assert_array_equal(jl.merge(tree, adapter)["embed"], embed)
    run = jl.lora_apply(model, on_materialize="error")
    got, want = jax.jit(
        lambda tree, adapter: (
            run(jl.combine(tree, adapter), IDS),
            model(merged_tree(tree, adapter), IDS),
        )
    )(tree, adapter)
    assert_close(got, want, 1e-5)


def test_only_the_rows_get_a_gradient():
    tree, adapter = toy()
    adapter = randomized(adapter)
    run = jl.lora_apply(model)
    loss = lambda tree: (run(tree, IDS) ** 2).sum()  # noqa: E731
    base, gradient = jl.partition(jax.jit(jax.grad(loss))(jl.combine(tree, adapter)))
    assert not np.any(base["embed"]) and not np.any(base["dense"]["kernel"])
    theirs = lambda p: (model(p, IDS) ** 2).sum()  # noqa: E731
    full = jax.jit(lambda *both: jax.grad(theirs)(merged_tree(*both)))(tree, adapter)
    assert_close(gradient.rows["embed"].values, full["embed"][jnp.array([6, 3])], 1e-4)


def test_combine_and_partition_undo_each_other():
    tree, adapter = toy()
    combined = jl.combine(tree, adapter)
    assert type(combined["embed"].update) is jl.TokenRows
    base, same = jl.partition(combined)
    assert base["embed"] is tree["embed"]
    assert same.rows["embed"].values is adapter.rows["embed"].values
    assert jax.tree.structure(same) == jax.tree.structure(adapter)


def test_masked_optimizers_train_the_rows_alone():
    tree, adapter = toy()
    combined = jl.combine(tree, adapter)
    mask = trainable_mask(combined)["embed"]
    assert (mask.base, mask.update.values) == (False, True)
    assert trainable_mask(adapter).rows["embed"].values is True
    tx = jl.masked_optimizer(optax.adamw(1e-2, weight_decay=0.1))
    with jax.numpy_dtype_promotion("standard"):

        @jax.jit
        def step(combined):
            gradient = jax.grad(lambda each: jl.lora_apply(model)(each, IDS).sum())(combined)
            updates, _ = tx.update(gradient, tx.init(combined), combined)
            return optax.apply_updates(combined, updates)

        base, moved = jl.partition(step(combined))
    assert_bitwise(base, tree)
    assert (moved.rows["embed"].values != adapter.rows["embed"].values).all()


PROBLEMS = {
    "a row that is not there": ([6, 7], "embed: the table of 7 rows has no row 7"),
    "a row below zero": ([-1], "embed: the table of 7 rows has no row -1"),
    "a row that occurs twice": ([3, 3], "embed: a row index occurs twice"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_that_do_not_fit_are_refused(name):
    indices, message = PROBLEMS[name]
    tree, _ = toy()
    rows = jl.TokenRows(jnp.zeros((len(indices), 4)), tuple(indices))
    with pytest.raises(StructureError, match=message):
        jl.combine(tree, jl.Adapter({}, {}, CONFIG, {"embed": rows}))


def test_rows_of_another_shape_and_of_no_leaf_are_refused_together():
    tree, _ = toy()
    wide, some = jl.TokenRows(jnp.zeros((1, 5)), (0,)), jl.TokenRows(jnp.zeros((1, 4)), (0,))
    with pytest.raises(StructureError) as caught:
        jl.combine(tree, jl.Adapter({}, {}, CONFIG, {"embed": wide, "embde": some}))
    text = str(caught.value)
    assert "embed: the tree has shape (7, 4), the 1 rows have shape (1, 5)" in text
    assert "embde: not in the tree; the closest paths are embed" in text


def test_a_leaf_has_rows_or_a_pair():
    tree, adapter = toy()
    pair = jl.LoraPair(jnp.zeros((7, 2)), jnp.zeros((2, 4)))
    both = jl.Adapter({"embed": pair}, {}, CONFIG, adapter.rows)
    with pytest.raises(StructureError, match="embed: is in more than one of pairs, whole and rows"):
        jl.combine(tree, both)


def test_merge_names_rows_that_are_not_finite_and_unmerge_refuses_rows():
    tree, adapter = toy()
    rows = jl.TokenRows(jnp.full((1, 4), jnp.nan), (2,))
    with pytest.raises(MergeError, match="embed: 4 elements of the trained rows are NaN or Inf"):
        jl.merge(tree, jl.Adapter({}, {}, CONFIG, {"embed": rows}))
    with pytest.raises(MergeError, match="(?s)unmerge: embed.*trained rows"):
        jl.unmerge(tree, adapter)


def test_a_checkpoint_brings_rows_back_and_checks_them(tmp_path):
    tree, adapter = toy()
    folder = tmp_path / "adapter"
    jl.save_adapter(folder, randomized(adapter), base=tree)
    again = jl.load_adapter(folder, base=tree)
    assert_bitwise(again, randomized(adapter))
    assert again.rows["embed"].indices == (6, 3)
    smaller = {**tree, "embed": tree["embed"][:6]}
    with pytest.raises(BaseMismatchError, match="embed: the table of 6 rows has no row 6"):
        jl.load_adapter(folder, base=smaller)
    reseal(folder, lambda values: values["rows"]["embed"].update(indices=[6, 6]))
    with pytest.raises(CheckpointError, match="a row index occurs twice"):
        jl.load_adapter(folder)


def test_the_summary_counts_rows():
    tree, adapter = toy()
    shown = jl.summary(tree, adapter)
    row = next(row for row in shown.rows if row.path == "embed")
    assert (row.kind, row.shape, row.rank, row.trainable) == ("rows", (7, 4), None, 8)
    assert shown.trainable == adapter.size == 8 + 2 * (4 + 4)
    assert shown.total == 7 * 4 + 4 * 4 + 2 * (4 + 4)  # rows take the place of the table's own
    assert "rows" in str(shown)
