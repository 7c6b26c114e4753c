"""Safetensors files are those of the format's own library, written one tensor at a time."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_lora.storage.safetensors_file import LazyTensor, write_tensors

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(4, dtype=ml_dtypes.bfloat16).reshape(2, 2).T,
    "größe": np.ones((), np.int32),
    "half": np.ones((3,), np.float16),
    "none": np.zeros((0, 2), np.float32),
}


def test_the_bytes_are_those_of_the_library(tmp_path):
    write_tensors(tmp_path / "ours", TENSORS)
    contiguous = {name: np.ascontiguousarray(each) for name, each in TENSORS.items()}
    contiguous["größe"] = TENSORS["größe"]
    save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_lazy_tensors_are_read_one_after_the_other(tmp_path):
    reads = []

    def lazy(name, array):
        return LazyTensor(array.shape, array.dtype, lambda: reads.append(name) or array)

    write_tensors(tmp_path / "lazy", {name: lazy(name, each) for name, each in TENSORS.items()})
    write_tensors(tmp_path / "eager", TENSORS)
    assert sorted(reads) == sorted(TENSORS)
    assert (tmp_path / "lazy").read_bytes() == (tmp_path / "eager").read_bytes()


def test_a_failure_to_write_is_an_error_of_the_file_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "absent" / "file", TENSORS)
