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


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "../x", "/etc/passwd", ""])
def test_a_checksum_of_a_file_that_cannot_be_is_a_problem(tmp_path, name):
    assert len(file_problems(tmp_path, {name: "0" * 32})) == 1


def test_a_folder_that_links_to_itself_is_a_problem(tmp_path):
    (tmp_path / "arrays").symlink_to(tmp_path / "arrays")
    assert len(file_problems(tmp_path / "arrays", {})) == 1
