"""Commands that download and upload by name, with a server on this machine."""

import contextlib
import hashlib
import json

import pytest
import yaml

from jax_lora.models import Llama, save
from tests.hub.command_process import CommandProcess
from tests.hub.hub_server import READ_ONLY, TOKEN, Hub
from tests.tiny_model import TINY, random_params, write_tokenizer

ROW = json.dumps({"prompt": "how many rows?", "completion": " count"}) + "\n"
# Reads the tokenizer of a model only, so nothing is compiled.
CHECK = ("data", "check", "data", "--model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("model"))
    save(folder, Llama(TINY), random_params(Llama(TINY)))
    return folder


@pytest.fixture(scope="module")
def files(folder):
    """Files of a repository: those of a model, and others that are not downloaded."""
    others = {"pytorch_model.bin": b"p", "modeling.py": b"raise", "onnx/model.safetensors": b"o"}
    return {file.name: file.read_bytes() for file in folder.iterdir()} | others


@pytest.fixture(scope="module")
def hub():
    with contextlib.closing(Hub()) as hub:
        yield hub


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    (place / "data").mkdir()
    for split in ("train", "test"):
        (place / f"data/{split}.jsonl").write_text(ROW * 8)
    return place


@pytest.fixture(scope="module")
def command(hub, place):
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(place / "home")}
    with contextlib.closing(CommandProcess(place, **variables)) as command:
        yield command


@pytest.fixture(scope="module")
def trained(hub, command, files, place):
    """A run on a model by its name, and the commit of the model at that time."""
    commit = hub.add("owner/tiny", files)
    options = ["--data", "data", "--iters", "1", "--rank", "2", "--adapter-path", "run"]
    status, _, err = command("train", "owner/tiny", *options)
    assert status == 0, err
    return place / "run", commit, err


@pytest.fixture(autouse=True)
def no_requests_yet(hub):
    hub.log.clear()


def snapshot(place, name, commit):
    return place / f"home/hub/models--{name.replace('/', '--')}/snapshots/{commit}"


def test_a_model_is_downloaded_without_code_and_trained(trained, place):
    run, commit, err = trained
    assert yaml.safe_load((run / "config.yaml").read_text())["model"] == f"owner/tiny@{commit}"
    assert "owner/tiny: downloading 4 files, " in err
    downloaded = {file.name for file in snapshot(place, "owner/tiny", commit).iterdir()}
    assert downloaded == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_plan_downloads_no_weights_and_training_downloads_them_later(command, hub, files, place):
    commit = hub.add("owner/planned", files)
    status, out, err = command("plan", "owner/planned", "--no-compile")
    assert status == 0 and "owner/planned" in out, err
    planned = snapshot(place, "owner/planned", commit)
    assert (planned / "config.json").is_file() and not (planned / "model.safetensors").exists()
    assert command(*CHECK, "owner/planned")[0] == 0
    assert (planned / "model.safetensors").is_file()


def test_a_cached_model_needs_no_connection(trained, command, hub):
    status, _, err = command(*CHECK, "owner/tiny")
    assert (status, err, hub.log) == (0, "", [])


def test_a_run_keeps_the_commit_that_it_was_trained_on(trained, command, hub, files, place):
    run, commit, _ = trained
    hub.repositories["owner/tiny"].commit({"config.json": b"{}"})
    for words in (
        ["fuse", "--adapter-path", run, "--save-path", "fused"],
        ["export", "--adapter-path", run, "exported"],
    ):
        status, out, err = command(*words)
        assert status == 0, err
        assert f"owner/tiny@{commit}" in out
    config = json.loads((place / "exported/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/tiny"
    assert config["revision"] == commit
    assert hub.log == []


def test_a_revision_is_downloaded_by_its_name(command, hub, files, place):
    hub.add("owner/branches", {"config.json": b"{}", "model.safetensors": b""})
    commit = hub.repositories["owner/branches"].commit(files, branch="refs/pr/1")
    status, _, err = command(*CHECK, "owner/branches@refs/pr/1")
    assert status == 0, err
    assert snapshot(place, "owner/branches", commit).is_dir()
    status, _, err = command(*CHECK, "owner/branches@v9")
    assert status == 2
    assert "no revision v9" in err and "owner/branches@REVISION" in err


def test_python_loads_a_name_and_a_pin_is_checked(command, hub, files, place, folder):
    commit = hub.add("owner/pinned", files)
    code = 'import jax_lora as jl; print(type(jl.models.load("owner/pinned")[0]).__name__)'
    assert command.python(code) == "Llama\n"
    names = sorted(file.name for file in folder.iterdir())
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in names]
    (place / "pins").write_text("".join(lines))
    assert command("plan", "owner/pinned", "--no-compile", "--pin", "pins")[0] == 0
    (place / "pins").write_text("".join([f"{'0' * 64}  {names[0]}\n", *lines[1:]]))
    status, _, err = command("plan", f"owner/pinned@{commit}", "--pin", "pins")
    assert status == 2 and "another SHA-256 hash" in err


def test_a_local_folder_of_that_name_is_used(command, hub, place, folder):
    (place / "mine").mkdir()
    (place / "mine/tiny").symlink_to(folder)
    assert command(*CHECK, "mine/tiny")[0] == 0
    assert hub.log == []


def test_a_download_that_is_cut_off_resumes(command, hub):
    weights = bytes(range(256)) * 2**17  # 32 MiB: the library writes after every 10 MiB
    hub.add("owner/large", {"config.json": b"{}", "model.safetensors": weights})
    hub.cuts["model.safetensors"] = 1
    code = (
        "import hashlib\nfrom jax_lora.hub.snapshots import local_folder\n"
        "data = (local_folder('owner/large') / 'model.safetensors').read_bytes()\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    assert command.python(code).strip() == hashlib.sha256(weights).hexdigest()
    assert any("bytes=" in line for line in hub.log)


def test_a_cache_without_all_files_is_completed(command, hub, files, place):
    commit = hub.add("owner/partial", files)
    assert command(*CHECK, "owner/partial")[0] == 0
    for name in ("model.safetensors", "tokenizer.json"):
        (snapshot(place, "owner/partial", commit) / name).unlink()
        assert command(*CHECK, "owner/partial")[0] == 0


@pytest.fixture(scope="module")
def closed(hub, files):
    """Repositories that not everybody can read, or that have nothing to read."""
    for name in ("secret/one", "secret/two"):
        hub.add(name, files, private=True)
    for name in ("gated/one", "gated/two", "gated/three"):
        hub.add(name, files, gated=True)
    hub.add("only/pickles", {"config.json": b"{}", "pytorch_model.bin": b""})


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("no/such", None, "private ones need a token"),
        ("no/such", TOKEN, "no such repository on the Hub that the token may read"),
        ("secret/one", None, "hf auth login, or set HF_TOKEN"),
        ("gated/one", None, "a gated repository, and no token"),
        ("gated/two", READ_ONLY, "a gated repository, and an account without access"),
        ("only/pickles", None, "only pickle files, pytorch_model.bin, which can run code"),
    ],
)
def test_a_repository_that_cannot_be_read_is_an_error(closed, command, name, token, message):
    status, _, err = command(*CHECK, name, token=token)
    assert status == 2
    assert message in err and err.startswith((f"error: {name}\n", f"{name}: downloading"))


@pytest.mark.parametrize("name", ["secret/two", "gated/three"])
def test_a_token_opens_private_and_gated_repositories(closed, command, name):
    assert command(*CHECK, name, token=TOKEN)[0] == 0


def test_an_adapter_is_pushed_and_loads_with_the_same_bytes(trained, command, hub, place):
    run, commit, _ = trained
    status, out, err = command("push", run, "me/adapter", "--private", token=TOKEN)
    assert status == 0, err
    assert out.startswith(f"{hub.endpoint}/me/adapter: ")
    repository = hub.repositories["me/adapter"]
    assert repository.private
    uploaded = repository.find("main")[1]
    assert set(uploaded) == {".gitattributes", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(uploaded["adapter_config.json"])["revision"] == commit
    words = ["export", "--adapter-path", "me/adapter", "again"]
    status, _, err = command(*words, token=TOKEN)
    assert status == 0, err
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (place / "again" / name).read_bytes() == uploaded[name]
    code = (
        "import jax_lora as jl\n"
        f"model, params = jl.models.load('owner/tiny@{commit}', dtype='float32')\n"
        "print(len(jl.peft.load('me/adapter', params, names=model.hf_names).pairs))"
    )
    assert command.python(code) == "7\n"


def test_a_model_is_pushed_to_a_branch_without_other_files(command, hub, folder, files, place):
    model = place / "pushed"
    model.mkdir()
    for name in (file.name for file in folder.iterdir()):
        (model / name).write_bytes(files[name])
    for name in ("optimizer.safetensors", "training.json", "train.jsonl", "pytorch_model.bin"):
        (model / name).write_bytes(b"not for others")
    (model / "README.md").write_text("# A model")
    status, out, err = command("push", model, "me/model", "--revision", "v1", token=TOKEN)
    assert status == 0, err
    assert out.startswith(f"{hub.endpoint}/me/model/tree/v1: ")
    uploaded = hub.repositories["me/model"].find("v1")[1]
    assert set(uploaded) == {".gitattributes", "README.md", *(f.name for f in folder.iterdir())}
    assert uploaded["model.safetensors"] == files["model.safetensors"]
    assert command(*CHECK, "me/model@v1")[0] == 0


@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (["run", "me/new"], None, "no token"),
        (["run", "me/new"], "wrong", "a token that the Hub refuses"),
        (["run", "me/new"], READ_ONLY, "a token without the permission"),
        (["run", "new"], TOKEN, "not the name of a repository"),
        (["run", "me/new@v1"], TOKEN, "a branch is --revision BRANCH"),
        (["run", "me/public", "--private"], TOKEN, "nothing is uploaded"),
        (["absent", "me/new"], TOKEN, "no such folder"),
        (["data", "me/new"], TOKEN, "a folder without adapter.json"),
        (["exported", "me/new", "--base-model", "x/y"], TOKEN, "Remove --base-model"),
    ],
)
def test_a_push_that_cannot_be_is_an_error(trained, command, hub, words, token, message):
    hub.add("me/public", {})
    command("export", "--adapter-path", trained[0], "exported")
    status, _, err = command("push", *words, token=token)
    assert status == 2
    assert message in err
    assert "me/new" not in hub.repositories
    assert hub.repositories["me/public"].find("main")[1] == {}


@pytest.mark.slow
def test_offline_a_cached_model_is_used_and_any_other_is_an_error(trained, hub, place):
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(place / "home/hub")}
    with contextlib.closing(CommandProcess(place, **variables, HF_HUB_OFFLINE="1")) as command:
        words = ["--adapter-path", "run", "--prompt", "a", "--max-tokens", "1"]
        status, _, err = command("generate", *words)
        assert status == 0, err
        assert command("eval", "--adapter-path", "run", "--data", "data")[0] == 0
        status, _, err = command(*CHECK, "owner/unknown")
        assert status == 2
        assert "HF_HUB_OFFLINE is set" in err
    assert hub.log == []
