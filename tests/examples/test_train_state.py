"""The example train_state.py."""

import re

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jax_lora as jl


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """The folder and the results of a short run."""
    folder = tmp_path_factory.mktemp("run")
    # Optax's own bias correction mixes integers and floats, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return folder, script.run(folder, steps=6, rank=4)


@pytest.mark.slow
def test_it_learns_and_does_not_change_the_base(finished):
    (before, half, after), base_unchanged, _ = finished[1]
    assert after < half < before - 0.5 and after < before - 2.0
    assert base_unchanged


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_the_same(script, finished):
    _, _, resumed_equals_straight = finished[1]
    assert resumed_equals_straight
    assert script.train_step._cache_size() == 1  # the resumed run does not recompile


def shapes_in(folder):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
    return sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(saved))


@pytest.mark.slow
def test_the_checkpoint_contains_only_the_adapter(script, finished):
    folder, _ = finished
    adapter = jl.load_adapter(folder / "adapter")
    leaves = sorted(leaf.shape for leaf in jax.tree.leaves(adapter))
    (arrays,) = (folder / "adapter").glob("arrays-*")
    assert shapes_in(arrays) == leaves
    # AdamW has two arrays per leaf of the adapter; its count and the step are scalars.
    states = [shape for shape in shapes_in(folder / "training") if shape]
    assert states == sorted(leaves * 2)
    # At rank 4 each has a few hundred kilobytes; the base model has 17 MB.
    assert script.megabytes(folder / "adapter") < 0.5
    assert script.megabytes(folder / "training") < 1.0


def test_batches_repeat_a_passage_and_depend_on_their_number_only(script):
    rows = script.batch(3)
    np.testing.assert_array_equal(rows[:, : script.PASSAGE], rows[:, script.PASSAGE :])
    np.testing.assert_array_equal(rows, script.batch(3))
    assert (rows != script.batch(4)).any()


def test_same_bits_detects_one_bit(script):
    one, other = np.zeros(3, np.float32), np.array([0.0, -0.0, 0.0], np.float32)
    assert script.same_bits({"a": one}, {"a": one.copy()})
    assert (one == other).all() and not script.same_bits({"a": one}, {"a": other})


def test_a_folder_in_use_is_a_message(script, tmp_path, usual_promotion):
    used = tmp_path / "adapter"
    used.mkdir()
    (used / "adapter.json").write_text("{}")
    with pytest.raises(SystemExit, match=re.escape(f"save_adapter: {used}")):
        script.main(["--steps", "0", "--rank", "1", "--out", str(tmp_path)])


@pytest.fixture
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
