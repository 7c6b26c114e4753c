import json

import jax
import jax.numpy as jnp
import pytest

from jax_lora import LoraConfig, lora_init, save_adapter
from jax_lora.errors import CheckpointError, ConfigError
from jax_lora.finetune.run_folder import RunFolder, find_checkpoint, read_run_config
from jax_lora.storage.json_files import json_checksum

BASE = {"kernel": jnp.ones((3, 4))}


@pytest.fixture
def adapter():
    return lora_init(jax.random.key(0), BASE, LoraConfig(rank=2))


def run_in(path, **options):
    run, moved = RunFolder.prepare(path, **options)
    run.write_config({"rank": 2})
    return run, moved


def saves(adapter):
    return lambda folder: save_adapter(folder, adapter, base=BASE)


def checkpoints(run):
    return sorted(folder.name for folder in run.path.glob("step-*"))


def test_an_earlier_run_is_moved_aside_and_never_overwritten(tmp_path, adapter):
    for number in range(3):
        run, moved = run_in(tmp_path / "adapters")
        run.save(number + 1, saves(adapter))
        assert moved == (tmp_path / f"adapters.{number}" if number else None)
    assert checkpoints(run) == ["step-000003"]
    assert (tmp_path / "adapters.1" / "step-000001").is_dir()
    assert (tmp_path / "adapters.2" / "step-000002").is_dir()


@pytest.mark.parametrize("content", ["notes.txt", "config.yaml"])
def test_a_folder_with_anything_else_is_refused_and_untouched(tmp_path, content):
    (tmp_path / content).write_text("mine")
    with pytest.raises(ConfigError, match="a folder that holds something else"):
        RunFolder.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [content]


def test_the_newest_checkpoints_and_the_best_one_stay(tmp_path, adapter):
    run, _ = run_in(tmp_path / "run")
    for step in range(1, 6):
        run.save(step, saves(adapter), (3.0, 1) if step == 1 else (1.0, 2), keep=2)
    assert checkpoints(run) == ["step-000002", "step-000004", "step-000005"]
    state = json.loads((run.path / "run.json").read_text())
    assert state.pop("seal") == json_checksum(state)
    assert state == {
        "last": "step-000005",
        "best": "step-000002",
        "best_val_loss": 1.0,
        "saved": checkpoints(run),
    }


def test_a_step_is_saved_once(tmp_path, adapter):
    run, _ = run_in(tmp_path / "run")
    assert run.save(5, saves(adapter)) == (run.path / "step-000005", True)
    assert run.save(5, saves(adapter)) == (run.path / "step-000005", False)


def test_a_run_means_its_best_checkpoint_and_without_validation_its_last(tmp_path, adapter):
    run, _ = run_in(tmp_path / "run")
    run.save(1, saves(adapter))
    run.save(2, saves(adapter))
    assert find_checkpoint(run.path).name == "step-000002"
    run.save(3, saves(adapter), (1.0, 3))
    run.save(4, saves(adapter), (1.0, 3))
    assert find_checkpoint(run.path).name == "step-000003"
    assert find_checkpoint(run.path / "step-000002").name == "step-000002"
    assert read_run_config(run.path / "step-000002") == {"rank": 2}


def test_no_checkpoint_is_an_error_that_names_the_path(tmp_path):
    run, _ = run_in(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run\n  got:      no checkpoint there"):
        find_checkpoint(run.path)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("name", ["../outside", "/tmp", "..", "a/b"])
def test_a_name_in_a_file_cannot_lead_out_of_the_folder(tmp_path, name):
    run, _ = run_in(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    (run.path / "run.json").write_text(json.dumps({"last": name, "best": name}))
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        find_checkpoint(run.path)


def test_a_checkpoint_that_dies_half_written_is_none_and_is_cleared_away(tmp_path, adapter):
    run, _ = run_in(tmp_path / "run")
    run.save(1, saves(adapter))

    def dies(folder):
        folder.mkdir()
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save(2, dies)
    assert find_checkpoint(run.path).name == "step-000001"
    again, aside = RunFolder.resume(run.path, checkpoint="step-000001")
    assert (checkpoints(again), aside) == (["step-000001"], None)
    assert again.save(2, saves(adapter))[1]


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path, adapter):
    run, _ = run_in(tmp_path / "run")
    for step in (1, 2, 3):
        run.save(step, saves(adapter))
    again, aside = RunFolder.resume(run.path, checkpoint="step-000001")
    assert checkpoints(again) == ["step-000001"]
    assert sorted(each.name for each in aside.iterdir()) == ["step-000002", "step-000003"]
    assert again.save(2, saves(adapter))[1]


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_run_json_is_rebuilt_from_the_folders_and_no_checkpoint_is_lost(tmp_path, adapter, damage):
    run, _ = run_in(tmp_path / "run")
    for step in (1, 2, 3):
        run.save(step, saves(adapter))
    state = run.path / "run.json"
    if damage == "missing":
        state.unlink()
    else:
        state.write_text(state.read_text()[:20] if damage == "cut" else "")
    (run.path / "step-000004.part").mkdir()  # what a kill leaves
    assert find_checkpoint(run.path).name == "step-000003"
    again, moved = RunFolder.resume(run.path, checkpoint="step-000003")
    assert checkpoints(again) == ["step-000001", "step-000002", "step-000003"] and moved is None
    again.save(4, saves(adapter), keep=4)
    names = ["step-000001", "step-000002", "step-000003", "step-000004"]
    assert json.loads(state.read_text())["saved"] == names == checkpoints(again)


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "\udc80", "a: &a [*a"])
def test_a_damaged_config_is_one_message(tmp_path, adapter, text):
    run, _ = run_in(tmp_path / "run")
    path, _ = run.save(1, saves(adapter))
    (run.path / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.yaml\n  got: .*\n  expected: the settings"):
        read_run_config(path)


def test_the_config_is_replaced_as_a_whole(tmp_path, monkeypatch):
    run, _ = run_in(tmp_path / "run")
    before = (run.path / "config.yaml").read_text()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        run.write_config({"rank": 3})
    assert (run.path / "config.yaml").read_text() == before
