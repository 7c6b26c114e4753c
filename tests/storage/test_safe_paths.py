"""No name and no link leads out of a folder, and each refusal is an error of this library."""

import pytest

from jax_lora.errors import ModelError
from jax_lora.storage.array_store import file_problems
from jax_lora.storage.safe_paths import contained


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "../x",
        "/etc/passwd",
        "C:\\x",
        "a\0",
        "a\n",
        "a" * 300,
        "\N{PILE OF POO}" * 70,
        "\ud800",
        None,
        [1],
        {},
    ],
    ids=repr,
)
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ModelError, match="without a path"):
        contained(tmp_path, name, ModelError)


def test_links_that_leave_or_have_no_end_are_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "circle").symlink_to(folder / "circle")
    for name in ("out", "circle"):
        with pytest.raises(ModelError):
            contained(folder, name, ModelError)


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_a_hub_cache_to_its_blobs_are_followed(tmp_path, shared):
    digest = "0f" * 32
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "commit"
    blobs = tmp_path / "models--owner--name" / "blobs"
    store = tmp_path / "blobs" / "0f"
    for folder in (snapshot, blobs, store):
        folder.mkdir(parents=True)
    if shared:  # the repository's blob is a link to the cache's
        (store / digest).write_text("weights")
        (blobs / "etag").symlink_to(f"../../blobs/0f/{digest}")
    else:
        (blobs / "etag").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/etag")
    assert contained(snapshot, "model.safetensors", ModelError).read_text() == "weights"
    (tmp_path / "blobs" / "secret").write_text("secret")
    (snapshot / "config.json").symlink_to(tmp_path / "blobs" / "secret")
    with pytest.raises(ModelError, match="a link to"):
        contained(snapshot, "config.json", ModelError)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "../x", "/etc/passwd", ""])
def test_a_checksum_of_a_file_that_cannot_be_is_a_problem(tmp_path, name):
    assert len(file_problems(tmp_path, {name: "0" * 32}, 0)) == 1


def test_a_folder_that_links_to_itself_is_a_problem(tmp_path):
    (tmp_path / "arrays").symlink_to(tmp_path / "arrays")
    assert len(file_problems(tmp_path / "arrays", {}, 0)) == 1
