import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jax_lora as jl
from jax_lora.checkpoint import load_adapter, manifest, save_adapter
from jax_lora.errors import BaseMismatchError, CheckpointError, CheckpointWarning
from jax_lora.storage import array_store, json_files
from jax_lora.storage import array_store as array_files
from jax_lora.storage.limits import limit_hint


def toy(seed=0):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    params = {
        "layers": {"kernel": normal(2, 16, 4, 8)},  # (layers, in, heads, head_dim)
        "up": {"kernel": normal(16, 32).astype(jnp.bfloat16), "bias": normal(32)},
        "head": normal(16, 3),
    }
    pairs = {
        "layers/kernel": jl.LoraPair(
            normal(2, 16, 2), normal(2, 2, 4, 8), (1,), (2, 3), (0,), scale=(2.0, 0.5)
        ),
        "up/kernel": jl.LoraPair(normal(16, 2), normal(2, 32).astype(jnp.bfloat16), scale=4.0),
    }
    config = jl.LoraConfig(rank=2, alpha=8.0, targets=["kernel"], rank_pattern={"up": 2})
    return params, jl.Adapter(pairs, {"head": normal(16, 3)}, config)


def assert_same(have, want):
    assert jax.tree.structure(have) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One saved adapter that tests copy from, since Orbax takes its time."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    params, adapter = toy()
    save_adapter(folder, adapter, base=params)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def reseal(folder, change):
    """Change adapter.json as someone would who knows how to seal it again."""
    file = folder / "adapter.json"
    values = json.loads(file.read_text())
    del values["seal"]
    change(values)
    file.write_text(json.dumps(values | {"seal": json_files.json_checksum(values)}))


# -----------------------------------------------------------------------------------------------
# There and back
# -----------------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved(saved):
    params, adapter = toy()
    assert_same(load_adapter(saved, base=params), adapter)


def test_loading_needs_no_base(saved):
    assert_same(load_adapter(saved), toy()[1])


def test_loading_compares_shapes_with_an_abstract_base(saved):
    params, adapter = toy()
    abstract = jax.eval_shape(lambda: params)
    assert_same(load_adapter(saved, base=abstract), adapter)


def test_a_combined_tree_will_do_as_base(saved):
    params, adapter = toy()
    assert_same(load_adapter(saved, base=jl.combine(params, adapter)), adapter)


def test_the_folder_holds_the_adapter_and_not_the_base(saved, tmp_path):
    params = {"kernel": jnp.ones((2048, 2048))}  # 16 MB
    adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2))
    save_adapter(tmp_path / "adapter", adapter, base=params)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < 2 * 4 * adapter.size < 100_000


def test_a_copied_folder_loads(copied):
    assert_same(load_adapter(copied, base=toy()[0]), toy()[1])


def test_a_loaded_adapter_compiles_nothing_anew(saved):
    params, adapter = toy()

    @jax.jit
    def total(adapter):
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(adapter))

    assert float(total(load_adapter(saved))) == float(total(adapter))
    assert total._cache_size() == 1


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_saved_from_eight_devices_it_loads_onto_any_number(count, tmp_path):
    params, adapter = toy()
    eight = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(eight, spec_of(leaf))), adapter
    )
    on_mesh = jax.device_put(params, NamedSharding(eight, PartitionSpec()))
    save_adapter(tmp_path / "adapter", sharded, base=on_mesh)
    mesh = jax.make_mesh(
        (count,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
    )
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec_of(leaf))
        ),
        adapter,
    )
    loaded = load_adapter(tmp_path / "adapter", base=params, target=target)
    assert_same(loaded, adapter)
    for leaf, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == want.sharding


def spec_of(leaf):
    """Shard the first axis that eight devices divide."""
    axes = [axis for axis, size in enumerate(leaf.shape) if size % 8 == 0][:1]
    return PartitionSpec(*("x" if axis in axes else None for axis in range(leaf.ndim)))


# -----------------------------------------------------------------------------------------------
# The wrong base
# -----------------------------------------------------------------------------------------------


def test_another_base_of_the_same_shapes_is_refused(saved):
    other = toy(seed=1)[0]
    with pytest.raises(BaseMismatchError) as info:
        load_adapter(saved, base=other)
    message = str(info.value)
    for path in ("head", "layers/kernel", "up/bias", "up/kernel"):
        assert f"{path}: has different values" in message
    assert str(saved) in message and "force=True" in message


def test_every_difference_of_the_base_is_in_one_message(saved):
    params = toy()[0]
    params["layers"]["kernel"] = params["layers"]["kernel"][:, :8]
    params["up"]["bias"] = params["up"]["bias"].astype(jnp.bfloat16)
    params["up"]["scale"] = jnp.ones(3)
    params["header"] = params.pop("head")
    with pytest.raises(BaseMismatchError) as info:
        load_adapter(saved, base=params)
    message = str(info.value)
    assert (
        "layers/kernel: the base has shape (2, 8, 4, 8), the adapter is for (2, 16, 4, 8)"
        in message
    )
    assert "up/bias: has dtype bfloat16, was saved with float32" in message
    assert "up/scale: not in the saved base model" in message
    assert "head: not in this base model; the closest paths are header" in message


def test_many_leaves_of_other_values_are_counted(tmp_path):
    params = {f"layer_{index:02d}": {"kernel": jnp.ones((2, 3))} for index in range(30)}
    adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=1))
    save_adapter(tmp_path / "adapter", adapter, base=params)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(BaseMismatchError, match="and 20 more leaves have different values"):
        load_adapter(tmp_path / "adapter", base=other)


def test_force_loads_for_another_base_and_says_so(saved):
    with pytest.warns(
        CheckpointWarning, match="force=True: loaded for a different base model[\\s\\S]*head"
    ):
        loaded = load_adapter(saved, base=toy(seed=1)[0], force=True)
    assert_same(loaded, toy()[1])


def test_force_does_not_load_into_other_shapes(saved):
    params = toy()[0]
    del params["up"]["kernel"]
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(BaseMismatchError, match="up/kernel: not in"),
    ):
        load_adapter(saved, base=params | {"head": params["head"] + 1}, force=True)


def test_without_a_fingerprint_shapes_are_compared_with_a_warning(tmp_path):
    params, adapter = toy()
    save_adapter(tmp_path / "adapter", adapter)
    with pytest.warns(CheckpointWarning, match="saved without a fingerprint"):
        assert_same(load_adapter(tmp_path / "adapter", base=params), adapter)
    params["head"] = params["head"][:, :2]
    with pytest.warns(CheckpointWarning), pytest.raises(BaseMismatchError, match="head: the base"):
        load_adapter(tmp_path / "adapter", base=params)


def test_a_target_that_does_not_fit_is_refused_with_all_that_differs(saved):
    _, adapter = toy()
    pairs = dict(adapter.pairs)
    pair = pairs.pop("up/kernel")
    pairs["down/kernel"] = pair
    layers = pairs["layers/kernel"]
    pairs["layers/kernel"] = jl.LoraPair(
        jnp.zeros((2, 16, 3)), layers.b, layers.in_axes, layers.out_axes, layers.stack_axes
    )
    with pytest.raises(CheckpointError) as info:
        load_adapter(saved, target=jl.Adapter(pairs, adapter.whole, adapter.config))
    message = str(info.value)
    assert "up/kernel: a is not in the target" in message
    assert "down/kernel: b is in the target, but was not saved" in message
    assert "layers/kernel: a was saved with shape (2, 16, 2) and dtype float32" in message


# -----------------------------------------------------------------------------------------------
# Damage
# -----------------------------------------------------------------------------------------------


def files_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_every_file_cut_short_or_with_a_changed_bit_is_refused(copied):
    for file in files_of(copied):
        whole = file.read_bytes()
        middle = len(whole) // 2
        for broken in (
            whole[:-1],
            b"",
            whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        ):
            file.write_bytes(broken)
            with pytest.raises(CheckpointError) as info:
                load_adapter(copied, base=toy()[0])
            assert file.name in str(info.value)
        file.write_bytes(whole)
    assert_same(load_adapter(copied, base=toy()[0]), toy()[1])


def test_damage_and_the_wrong_base_are_told_together(copied):
    first, second = files_of(next(copied.glob("arrays-*")))[:2]
    first.unlink()
    second.write_bytes(b"x")
    (second.parent / "extra").write_bytes(b"x")
    with pytest.raises(CheckpointError) as info:
        load_adapter(copied, base=toy(seed=1)[0])
    message = str(info.value)
    assert f"{first.name}: is missing" in message
    assert f"{second.name}: does not match its checksum" in message
    assert "extra: is not in the manifest" in message
    assert "up/bias: has different values" in message


def replace_arrays(folder, tree):
    """Put another Orbax checkpoint in the place of the arrays, with file checksums to match."""
    arrays = next(folder.glob("arrays-*"))
    shutil.rmtree(arrays)
    array_store.write_arrays(arrays, tree)
    reseal(folder, lambda values: values.update(files=array_store.checksums(arrays)))


def test_missing_and_extra_leaves_are_refused_by_name(copied):
    tree = manifest.array_tree(jax.tree.map(np.asarray, toy()[1]))
    tree["0001"] = {"b": tree["0001"]["b"], "c": np.zeros(3, np.float32)}
    replace_arrays(copied, tree)
    with pytest.raises(CheckpointError, match="structures do not match[\\s\\S]*0001") as info:
        load_adapter(copied)
    assert "np.ndarray" in str(info.value)  # what stands where nothing should, in Orbax's words


def test_reshaped_retyped_and_altered_leaves_are_told_together(copied):
    tree = manifest.array_tree(jax.tree.map(np.asarray, toy()[1]))
    tree["0000"]["a"] = tree["0000"]["a"][:, :8]
    tree["0001"]["a"] = tree["0001"]["a"].astype(np.float16)
    tree["0002"]["value"] = tree["0002"]["value"] + 1
    replace_arrays(copied, tree)
    with pytest.raises(CheckpointError) as info:
        load_adapter(copied)
    message = str(info.value)
    assert "layers/kernel: a has shape (2, 8, 2) and dtype float32, expected (2, 16, 2)" in message
    assert (
        "up/kernel: a has shape (16, 2) and dtype float16, expected (16, 2) and float32" in message
    )
    assert "head does not match its checksum" in message


def test_a_strangers_numbers_that_are_not_finite_are_refused(copied):
    adapter = jax.tree.map(np.array, toy()[1])
    adapter.whole["head"][0, :2] = np.nan, np.inf
    tree = manifest.array_tree(adapter)
    replace_arrays(copied, tree)
    checksum = manifest.make_record(adapter.whole["head"]).checksum
    reseal(copied, lambda values: values["whole"]["head"].update(checksum=checksum))
    with pytest.raises(CheckpointError, match="head has 2 elements that are NaN or Inf"):
        load_adapter(copied)


def test_a_checkpoint_of_format_1_is_still_read(copied):
    def age(values):
        values.update(version=1)
        values["config"].pop("layers")
        values["config"].pop("metadata")
        for pair in values["pairs"].values():
            pair.pop("ranks")

    reseal(copied, age)
    assert_same(load_adapter(copied, base=toy()[0]), toy()[1])


def test_a_folder_without_an_adapter_says_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_adapter(tmp_path / "none")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="without adapter.json, holding model.safetensors"):
        load_adapter(tmp_path)


# -----------------------------------------------------------------------------------------------
# A stranger's folder
# -----------------------------------------------------------------------------------------------


def test_names_that_lead_out_of_the_folder_are_refused(copied):
    for name in ("../x", "/etc/passwd", "a/../../x", "a\\..\\x", "nul\0", "a//b", "."):
        reseal(copied, lambda values, name=name: values["files"].update({name: "0" * 32}))
        with pytest.raises(CheckpointError, match="file names must be relative"):
            load_adapter(copied)
        reseal(copied, lambda values, name=name: values["files"].pop(name))
    for name in ("../arrays-0123456789ab", "/tmp", "arrays-0123456789ab/..", ""):
        reseal(copied, lambda values, name=name: values.update(arrays=name))
        with pytest.raises(CheckpointError, match="the arrays folder must be named"):
            load_adapter(copied)


def test_links_that_lead_out_of_the_folder_are_refused(copied, saved):
    arrays = next(copied.glob("arrays-*"))
    file = files_of(arrays)[0]
    file.unlink()
    file.symlink_to(files_of(next(saved.glob("arrays-*")))[0])
    with pytest.raises(CheckpointError, match="is a link that leaves the folder"):
        load_adapter(copied)
    shutil.rmtree(arrays)
    arrays.symlink_to(next(saved.glob("arrays-*")))
    with pytest.raises(CheckpointError, match="is a link that leaves the folder"):
        load_adapter(copied)


def set_pair(**changes):
    return lambda values: values["pairs"]["up/kernel"].update(changes)


def set_leaf(**changes):
    return lambda values: values["pairs"]["up/kernel"]["a"].update(changes)


NONSENSE = {
    "another format": (lambda v: v.update(format="x"), "format 'x'"),
    "a newer version": (lambda v: v.update(version=4), "format version 4[\\s\\S]*version 3"),
    "no config": (lambda v: v.pop("config"), "config = missing: expected an object"),
    "an unknown setting": (lambda v: v["config"].update(auto_map="x.py"), "'auto_map'"),
    "a bad rank": (lambda v: v["config"].update(rank=0), "rank"),
    "a huge shape": (set_leaf(shape=[2**39, 2]), "incompatible shapes|the arrays have"),
    "a shape beyond all": (set_leaf(shape=[2**80, 2]), "a.shape.0 = 1208925819614629174706176"),
    "a negative shape": (set_leaf(shape=[-16, 2]), "a.shape.0 = -16: expected an integer from 0"),
    "an object type": (set_leaf(dtype="O"), "numeric dtype or bool, got .O."),
    "an unknown type": (set_leaf(dtype="float12"), "float12"),
    "axes that repeat": (set_pair(in_axes=[0], out_axes=[0]), "axes"),
    "factors that do not fit": (set_pair(in_axes=[0, 1], out_axes=[2]), "incompatible shapes"),
    "a scale of text": (set_pair(scale="2"), "scale = '2': expected a finite number"),
    "scales for no layers": (set_pair(scale=[1.0, 2.0]), "scale must be a number, or nested lists"),
    "pairs of the wrong kind": (
        lambda v: v.update(pairs=[1]),
        r"pairs = \[1\]: expected an object",
    ),
    "a base of the wrong kind": (
        lambda v: v.update(base={"x": 1}),
        "base.x = 1: expected an object",
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_values_that_fit_no_adapter_are_refused(name, copied):
    change, reason = NONSENSE[name]
    reseal(copied, change)
    with pytest.raises(CheckpointError, match=reason):
        load_adapter(copied)


def test_too_many_bytes_are_refused_before_anything_is_allocated(copied):
    def enlarge(values):
        pair = values["pairs"]["up/kernel"]
        pair["a"]["shape"], pair["b"]["shape"] = [2**36, 2], [2, 2**36]

    reseal(copied, enlarge)
    with pytest.raises(CheckpointError, match="the arrays have .* bytes, more than"):
        load_adapter(copied)


def test_arrays_far_larger_than_their_files_are_refused(copied, monkeypatch):
    monkeypatch.setenv("JAX_LORA_LIMITS", "expanded_bytes=1,expansion=1")
    load_adapter(copied)

    def enlarge(values):
        pair = values["pairs"]["up/kernel"]
        pair["a"]["shape"], pair["b"]["shape"] = [2**20, 2], [2, 2**20]

    reseal(copied, enlarge)
    with pytest.raises(CheckpointError, match=r"arrays of .* bytes in .* bytes of files") as caught:
        load_adapter(copied)
    assert limit_hint("expanded_bytes") in str(caught.value)


# -----------------------------------------------------------------------------------------------
# Saving where something is already, and saves that fail
# -----------------------------------------------------------------------------------------------


def test_an_adapter_is_replaced_only_when_told(copied):
    params, _ = toy()
    newer = jax.tree.map(lambda leaf: leaf + 1, toy()[1])
    with pytest.raises(CheckpointError, match="a folder with an adapter[\\s\\S]*overwrite=True"):
        save_adapter(copied, newer, base=params)
    (copied / "notes.txt").write_text("mine")
    save_adapter(copied, newer, base=params, overwrite=True)
    assert_same(load_adapter(copied, base=params), newer)
    assert len(list(copied.glob("arrays-*"))) == 1
    assert (copied / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(CheckpointError, match="a file of that name"):
        save_adapter(tmp_path / "adapter", toy()[1])
    assert (tmp_path / "adapter").read_text() == "mine"


@pytest.mark.parametrize("where", ["write_arrays", "checksums", "os.replace", "os.fsync"])
def test_a_save_that_fails_leaves_the_previous_adapter(where, copied, monkeypatch):
    params, adapter = toy()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    owner = os if where.startswith("os.") else array_files
    monkeypatch.setattr(owner, where.removeprefix("os."), full)
    newer = jax.tree.map(lambda leaf: leaf + 1, adapter)
    with pytest.raises(CheckpointError, match="No space left[\\s\\S]*unchanged"):
        save_adapter(copied, newer, base=params, overwrite=True)
    monkeypatch.undo()
    assert_same(load_adapter(copied, base=params), adapter)
    assert sorted(each.name[:7] for each in copied.iterdir()) == ["adapter", "arrays-"]


def test_what_an_interrupted_first_save_left_is_in_nobodys_way(tmp_path):
    left = tmp_path / "adapter" / "arrays-000000000000"
    left.mkdir(parents=True)
    (left / "part").write_text("half")
    with pytest.raises(CheckpointError, match="An interrupted save leaves no adapter"):
        load_adapter(tmp_path / "adapter")
    save_adapter(tmp_path / "adapter", toy()[1])
    assert not left.exists()
    assert_same(load_adapter(tmp_path / "adapter"), toy()[1])


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    _, adapter = toy()
    pair = adapter.pairs["up/kernel"]
    broken = jl.LoraPair(pair.a.at[0, 0].set(np.nan), pair.b.at[1].set(np.inf), scale=pair.scale)
    adapter = jl.Adapter({**adapter.pairs, "up/kernel": broken}, adapter.whole, adapter.config)
    with pytest.raises(CheckpointError) as info:
        save_adapter(tmp_path / "adapter", adapter)
    assert "up/kernel: a has 1 elements that are NaN or Inf" in str(info.value)
    assert "up/kernel: b has 32 elements that are NaN or Inf" in str(info.value)
    assert not (tmp_path / "adapter").exists()


def test_shapes_without_values_are_not_saved(tmp_path):
    adapter = jax.eval_shape(lambda: toy()[1])
    with pytest.raises(CheckpointError, match="ShapeDtypeStruct without values"):
        save_adapter(tmp_path / "adapter", adapter)


CHILD = """
import sys, jax, jax.numpy as jnp
import jax_lora as jl
from jax_lora.checkpoint import save_adapter
params = {"kernel": jnp.ones((64, 64))}
for step in range(10_000):
    pair = jl.LoraPair(jnp.full((64, 8), float(step)), jnp.full((8, 64), float(step)))
    adapter = jl.Adapter({"kernel": pair}, {}, jl.LoraConfig(rank=8))
    save_adapter(sys.argv[1], adapter, base=params, overwrite=True)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_complete_adapter(tmp_path):
    params = {"kernel": jnp.ones((64, 64))}
    draw = np.random.default_rng(0)
    for _ in range(4):
        reported = steps_until_killed(tmp_path / "adapter", draw.uniform(0.0, 1.0))
        pair = load_adapter(tmp_path / "adapter", base=params).pairs["kernel"]
        step = float(pair.a[0, 0])
        assert (pair.a == step).all() and (pair.b == step).all()
        assert step >= reported[-1]


def steps_until_killed(folder, seconds):
    """Let a child save one step after another, and kill it some time after the first."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        return [int(line) for line in [first, *child.stdout.read().split()]]
