import hashlib
import sys

import pytest

from jax_lora.errors import ModelError
from jax_lora.storage.pinned_files import check_pins


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "a model"
    (folder / "inner").mkdir(parents=True)
    for name in ("config.json", "inner/file", ".hidden"):
        (folder / name).write_text(name)
    return folder


def pins(file, *names, prefix="", mark=" "):
    lines = [
        f"{hashlib.sha256(name.encode()).hexdigest()} {mark}{prefix}{name}\n" for name in names
    ]
    file.write_text("".join(lines))
    return file


def test_the_same_files_pass_by_names_relative_to_either_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_pins(folder, pins(tmp_path / "pins", "config.json", "inner/file"))
    check_pins(folder, pins(tmp_path / "pins", "config.json", "inner/file", prefix="./", mark="*"))
    file = pins(tmp_path / "pins", "config.json", "inner/file", prefix="a model/")
    check_pins(folder, file)
    check_pins(folder.relative_to(tmp_path), file)
    check_pins(folder, pins(folder / "PINS", "config.json", "inner/file"))


def test_every_difference_is_named(folder, tmp_path):
    file = pins(tmp_path / "pins", "config.json", "absent", "inner/file")
    (folder / "config.json").write_text("other")
    (folder / "new.json").write_text("")
    with pytest.raises(ModelError) as error:
        check_pins(folder, file)
    for text in ("absent: no such file", "config.json: another", "new.json: not in the list"):
        assert text in str(error.value)
    assert "inner/file:" not in str(error.value)


@pytest.mark.parametrize("content", ["", "\n", "abc  config.json\n", "\ud800", None])
def test_a_list_that_cannot_be_read_is_an_error(folder, tmp_path, content):
    file = tmp_path / "pins"
    if content is not None:
        file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match="sha256sum"):
        check_pins(folder, file)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that even root cannot read")
def test_a_file_that_cannot_be_read_differs(folder, tmp_path):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/proc/self/mem")
    with pytest.raises(ModelError, match="config.json: another"):
        check_pins(folder, pins(tmp_path / "pins", "config.json", "inner/file"))
