"""The compilation cache: its folder, when it is disabled, and that results do not change."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_lora.finetune import compile_cache
from jax_lora.finetune.compile_cache import find_compile_cache, use_compile_cache

ROOT = Path(__file__).parents[2]
# A program of its own: the cache of this process stays as it is.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax_lora.finetune import compile_cache
compile_cache.LEAST_SECONDS = 0.0
assert not compile_cache.use_compile_cache().why_off
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
def step(w, x):
    return w - 0.1 * jax.grad(lambda w: jnp.tanh(x @ w).sum())(w)
w = jax.jit(step, donate_argnums=0)(jnp.full((33, 17), 0.1), jnp.linspace(-1, 1, 99).reshape(3, 33))
print(sum("cache_hits" in name for name in events), np.asarray(w).tobytes().hex()[-400:])
"""


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_LORA_NO_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return monkeypatch


def test_the_default_folder_is_in_the_users_cache_and_per_processor(environment, tmp_path):
    found = find_compile_cache()
    assert found.folder.parent == tmp_path / "xdg" / "jax_lora"
    assert found.folder.is_dir() and not found.why_off
    environment.delenv("XDG_CACHE_HOME")
    environment.setenv("HOME", str(tmp_path))
    assert find_compile_cache().folder.parent == tmp_path / ".cache" / "jax_lora" / "xla"


def test_another_processor_has_another_folder(environment):
    here = find_compile_cache().folder
    environment.setattr(compile_cache.platform, "machine", lambda: "other")
    assert find_compile_cache().folder != here


def test_the_environment_variable_of_jax_selects_the_folder(environment, tmp_path):
    environment.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    assert find_compile_cache().folder == tmp_path / "mine"


@pytest.mark.parametrize("value", ["1", "true"])
def test_an_environment_variable_disables_the_cache(environment, tmp_path, value):
    environment.setenv("JAX_LORA_NO_CACHE", value)
    assert use_compile_cache().why_off == "JAX_LORA_NO_CACHE is set"
    assert not (tmp_path / "xdg").exists()


def test_a_folder_that_cannot_be_created_disables_the_cache(environment, tmp_path):
    (tmp_path / "xdg").write_text("a file")
    assert "cannot be made" in use_compile_cache().why_off


def test_a_folder_that_is_not_writable_disables_the_cache(environment):
    environment.setattr(compile_cache.os, "access", lambda *_: False)
    assert "cannot be written to" in use_compile_cache().why_off


def test_its_size_is_that_of_its_files(environment):
    found = find_compile_cache()
    assert found.size == 0
    (found.folder / "program").write_bytes(bytes(100))
    assert found.size == 100


def test_a_second_process_uses_the_cache_and_computes_the_same_bits(tmp_path):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "XLA_FLAGS": ""}
    environment.pop("JAX_LORA_NO_CACHE", None)
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        said.append(done.stdout.split())
    (first, bits), (second, again) = said
    assert (int(first), int(second) > 0) == (0, True)
    assert bits == again
