"""The memory of this process."""

import sys
from pathlib import Path

import numpy as np
import pytest

from jax_lora.finetune.memory import peak_memory, release_freed_memory, resident_memory

MB = 2**20
needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")


def resident() -> int:
    size = resident_memory()
    assert size is not None
    return size


@needs_linux
def test_resident_memory_counts_the_pages_that_were_written():
    before = resident()
    array = np.ones(64 * MB, np.uint8)
    assert resident() - before > 60 * MB
    assert peak_memory() * 1e9 >= resident() - MB
    del array


@needs_linux
def test_freed_memory_is_returned_to_the_system():
    small = [np.ones(MB // 64, np.uint8) for _ in range(64 * 64)]  # from the heap
    last = np.ones(MB // 64, np.uint8)  # keeps the heap's end in use
    full = resident()
    del small
    release_freed_memory()
    assert full - resident() > 40 * MB
    assert last.all()


def test_releasing_memory_does_nothing_without_the_gnu_c_library(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    release_freed_memory()
