import json
import shutil

import jax
import jax.numpy as jnp
import optax
import pytest

from jax_lora import LoraConfig, lora_init, save_adapter
from jax_lora.errors import CheckpointError
from jax_lora.finetune.commit_mark import MARK, check_mark
from jax_lora.finetune.run_folder import RunFolder, find_checkpoint
from jax_lora.finetune.training_state import find_resumable, save_state
from jax_lora.storage.json_files import json_checksum

BASE = {"kernel": jnp.ones((3, 4))}


def train(path, seed=0):
    run, _ = RunFolder.prepare(path)
    for step in (1, 2, 3):
        adapter = lora_init(jax.random.key(seed + step), BASE, LoraConfig(rank=2))

        def write(part, adapter=adapter, step=step):
            save_adapter(part, adapter, base=BASE)
            state = optax.sgd(0.1, momentum=0.9).init(adapter)
            save_state(part, state, {"ledger": {"step": step, "best_step": 2, "best_loss": 1.0}})

        run.save(step, write, (1.0, 2) if step > 1 else None)
    return run.path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_complete_checkpoint_is_resumed(run):
    assert find_resumable(run) == run / "step-000003"
    assert find_resumable(run / "step-000001") == run / "step-000001"


@pytest.mark.parametrize("name", ["training.json", "adapter.json", "commit.json"])
def test_a_file_of_another_step_is_refused_by_name(run, name):
    shutil.copy(run / "step-000002" / name, run / "step-000003" / name)
    with pytest.raises(CheckpointError, match=name):
        find_resumable(run)


def test_a_file_of_another_run_is_refused_by_name(run, tmp_path):
    other = train(tmp_path / "other", seed=9)
    shutil.copy(other / "step-000003" / "adapter.json", run / "step-000003" / "adapter.json")
    with pytest.raises(CheckpointError, match=r"adapter\.json: does not match its checksum"):
        find_resumable(run)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run):
    shutil.copytree(run / "step-000002", run / "step-000004")
    with pytest.raises(CheckpointError, match="of step 2, in a folder of step 4"):
        find_resumable(run)
    shutil.copytree(run / "step-000002", run / "kept")
    check_mark(run / "kept", required=True)


def test_an_edited_step_is_refused_even_if_its_own_seal_fits(run):
    file = run / "step-000003" / "training.json"
    record = json.loads(file.read_text())
    del record["seal"]
    record["ledger"]["step"] = 2
    file.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        find_resumable(run)
    file.write_text(json.dumps(record | {"seal": json_checksum(record)}))
    with pytest.raises(CheckpointError, match=r"training\.json: does not match its checksum"):
        find_resumable(run)


def test_a_checkpoint_without_its_mark_is_refused(run):
    (run / "step-000003" / MARK).unlink()
    with pytest.raises(CheckpointError, match=r"no commit\.json"):
        find_resumable(run)


def test_a_missing_file_is_named(run):
    (run / "step-000003" / "adapter.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter\.json: is missing"):
        check_mark(run / "step-000003")


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"format": "x"}, {"step": "3"}, {"files": []}, {"seal": None}],
)
def test_a_mark_that_is_not_one_is_refused(run, change):
    file = run / "step-000003" / MARK
    values = json.loads(file.read_text()) | change
    if "seal" not in change:
        del values["seal"]
        values["seal"] = json_checksum(values)
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"commit\.json"):
        check_mark(run / "step-000003")


@pytest.mark.parametrize("damage", ["edited", "missing", "of another run"])
def test_the_best_checkpoint_comes_from_the_folders_where_run_json_is_not_sound(run, damage):
    state = run / "run.json"
    assert find_checkpoint(run).name == "step-000002"
    if damage == "missing":
        state.unlink()
    elif damage == "edited":
        state.write_text(
            state.read_text().replace('"best": "step-000002"', '"best": "step-000001"')
        )
    else:
        state.write_text('{"saved": ["step-000009"], "best": "step-000009", "last": NaN}')
    assert find_checkpoint(run).name == "step-000002"
    assert find_checkpoint(run, last=True).name == "step-000003"
