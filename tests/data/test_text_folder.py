"""A folder of texts may have file names in any encoding."""

import os

import pytest

from jax_lora.data.text_folder import read_text_folder


def test_a_file_name_that_is_not_utf8_is_read(tmp_path):
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
            file.write("a text")
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    found = read_text_folder(tmp_path)
    assert found is not None and [row.fields["text"] for row in found.rows] == ["a text"]
