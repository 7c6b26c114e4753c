import os
from pathlib import Path

import pytest

from jax_lora.errors import CheckpointError, DataError
from jax_lora.storage.atomic_writes import (
    append_text,
    is_interrupted,
    made_folder,
    recover,
    replacing,
    replacing_both,
    write_error,
    write_file,
)
from tests.file_limits import largest_file


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path):
    file = tmp_path / "config.yaml"
    write_file(file, "old", DataError)
    file.chmod(0o600)
    write_file(file, "a\nb\r\n", DataError)
    assert file.read_bytes() == b"a\nb\r\n" and file.stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["config.yaml"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_file(tmp_path / "link", "new", DataError)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_device_is_written_to_and_never_replaced():
    write_file(Path("/dev/null"), "new", DataError)
    assert not Path("/dev/null").is_file()
    with pytest.raises(DataError, match=r"No space left[\s\S]*Free some space"):
        write_file(Path("/dev/full"), "new", DataError)


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_what_fails_or_is_interrupted_leaves_the_old_and_nothing_else(tmp_path, failure):
    write_file(tmp_path / "file", "old", DataError)
    with pytest.raises((DataError, KeyboardInterrupt)):
        with replacing(tmp_path / "file", DataError) as part:
            part.write_text("ne")
            raise failure
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_file_that_is_too_large_is_our_own_error(tmp_path):
    write_file(tmp_path / "file", "old", DataError)
    with largest_file(100), pytest.raises(DataError, match=r"too large[\s\S]*ulimit -f"):
        write_file(tmp_path / "file", "new" * 100, DataError)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append_text(file, "one\n", CheckpointError)
    with largest_file(6), pytest.raises(CheckpointError, match="too large"):
        append_text(file, "two\n", CheckpointError)
    append_text(file, "three\n", CheckpointError)
    assert file.read_text() == "one\nthree\n"


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("file/inside", "A file has the name of a folder"),
        ("absent/inside", "Create the folder first"),
        ("folder", "A folder has the name of the file"),
        ("x" * 300, "Choose a shorter name"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_with_a_fix(tmp_path, where, reason):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    before = names(tmp_path)
    with pytest.raises(DataError, match=reason):
        write_file(tmp_path / where, "new", DataError)
    assert names(tmp_path) == before and (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_was_made_in_vain_is_removed_with_its_parents(tmp_path):
    with pytest.raises(KeyError), made_folder(tmp_path / "a" / "b", DataError):
        raise KeyError
    assert names(tmp_path) == []
    (tmp_path / "a").write_text("mine")
    with pytest.raises(DataError, match="A file has the name of a folder"):
        with made_folder(tmp_path / "a" / "b", DataError):
            pass
    assert (tmp_path / "a").read_text() == "mine"


def save_both(folder, text, fail=False):
    with replacing_both(folder, "weights", "index", DataError) as (weights, index):
        weights.write_text(text)
        index.write_text(text)
        if fail:
            raise OSError(28, "No space left")


def read_both(folder):
    return [(folder / name).read_text() for name in ("weights", "index")]


def test_two_files_are_replaced_together(tmp_path):
    save_both(tmp_path, "old")
    with pytest.raises(DataError):
        save_both(tmp_path, "new", fail=True)
    assert read_both(tmp_path) == ["old", "old"]
    save_both(tmp_path, "new")
    assert read_both(tmp_path) == ["new", "new"] and names(tmp_path) == ["index", "weights"]


def test_a_killed_replacement_can_be_undone_without_a_save(tmp_path):
    save_both(tmp_path, "old")
    assert not is_interrupted(tmp_path, "index")
    os.rename(tmp_path / "index", tmp_path / "index.01234567.old")
    assert is_interrupted(tmp_path, "index")
    recover(tmp_path, "weights", "index")
    assert read_both(tmp_path) == ["old", "old"] and names(tmp_path) == ["index", "weights"]


@pytest.mark.parametrize("at", ["aside", "between"])
def test_a_killed_replacement_is_undone_by_the_next(tmp_path, at):
    save_both(tmp_path, "old")
    for name in ("index", "weights"):
        os.rename(tmp_path / name, tmp_path / f"{name}.01234567.old")
    if at == "between":
        (tmp_path / "weights").write_text("new")
    (tmp_path / "index.01234567.part").write_text("new")
    with pytest.raises(DataError):
        save_both(tmp_path, "newer", fail=True)
    assert read_both(tmp_path) == ["old", "old"] and names(tmp_path) == ["index", "weights"]


def test_the_words_of_a_library_are_searched_for_the_cause():
    error = write_error("x", DataError, ValueError("INTERNAL: ...: No space left on device [...]"))
    assert "No space left on device (ValueError)" in str(error)
    assert "Free some space on this file system" in str(error)
