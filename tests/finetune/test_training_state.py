import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.errors import CheckpointError
from jax_lora.finetune.training_state import (
    has_state,
    load_opt_state,
    read_record,
    save_state,
)

PARAMS = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}


@pytest.fixture
def saved(tmp_path):
    moments = optax.adamw(0.1).init(PARAMS)
    save_state(tmp_path, moments, {"ledger": {"step": 3}})
    return tmp_path, moments


def damage(folder):
    files = [each for each in (folder / "moments").rglob("*") if each.is_file()]
    file = max(files, key=lambda each: each.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("make", [optax.adamw, optax.sgd, optax.lion])
def test_moments_come_back_to_the_bit(tmp_path, make):
    moments = jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), make(0.1).init(PARAMS))
    save_state(tmp_path, moments, {})
    again = load_opt_state(tmp_path, read_record(tmp_path), make(0.1).init(PARAMS))
    assert jax.tree.structure(again) == jax.tree.structure(moments)
    jax.tree.map(np.testing.assert_array_equal, again, moments)


def test_a_random_key_in_the_state_comes_back(tmp_path):
    save_state(tmp_path, {"key": jax.random.key(7)}, {})
    again = load_opt_state(tmp_path, read_record(tmp_path), {"key": jax.random.key(0)})
    assert jax.random.bits(again["key"]) == jax.random.bits(jax.random.key(7))


def test_a_byte_that_changed_is_refused(saved):
    folder, moments = saved
    damage(folder)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_opt_state(folder, read_record(folder), moments)


def test_the_state_of_another_optimizer_is_refused(saved):
    folder, _ = saved
    with pytest.raises(CheckpointError, match="a checkpoint with the state of its run"):
        load_opt_state(folder, read_record(folder), optax.sgd(0.1, momentum=0.9).init(PARAMS))
    other = optax.adamw(0.1).init({"a": jnp.ones((2, 4)), "b": jnp.ones(4)})
    with pytest.raises(CheckpointError, match=r"float32 \(2, 3\) instead of float32 \(2, 4\)"):
        load_opt_state(folder, read_record(folder), other)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "JSONDecodeError"), ('{"version": 9}', "version 9 of training.json")],
)
def test_a_record_that_cannot_be_read_is_refused(saved, text, message):
    folder, _ = saved
    (folder / "training.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_record(folder)


def test_a_record_without_checksums_is_refused(saved):
    folder, moments = saved
    (folder / "training.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(CheckpointError, match="has no checksums"):
        load_opt_state(folder, read_record(folder), moments)


def test_a_state_is_there_whole_or_not_at_all(saved):
    folder, _ = saved
    assert has_state(folder)
    (folder / "training.json").unlink()
    assert not has_state(folder)
    with pytest.raises(CheckpointError, match="without training.json"):
        read_record(folder)
