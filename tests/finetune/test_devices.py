import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.finetune import devices

SMALL = {"kernel": jnp.ones((2, 2))}


@pytest.mark.parametrize(("rows", "count"), [(16, 8), (8, 8), (6, 6), (12, 6), (7, 7), (1, 1)])
def test_the_number_of_devices_divides_the_rows(rows, count):
    assert devices.data_mesh(rows, SMALL).size == count


def test_a_large_base_is_not_replicated_on_cpu_devices(monkeypatch):
    monkeypatch.setattr(devices, "MOST_CPU_COPIES", 3 * SMALL["kernel"].nbytes)
    assert devices.data_mesh(8, SMALL).size == 2


def test_rows_are_sharded_and_parameters_replicated():
    mesh = devices.data_mesh(4, SMALL)
    batch = devices.split_rows({"ids": np.arange(8).reshape(4, 2)}, mesh)["ids"]
    assert [shard.data.shape for shard in batch.addressable_shards] == [(1, 2)] * 4


def test_a_number_of_devices_set_by_the_user_is_kept(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: asked.append(name))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    devices.use_all_cores()
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    devices.use_all_cores()
    assert asked == []
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    devices.use_all_cores()
    assert asked == ["jax_num_cpu_devices"]


def test_initialized_devices_are_unchanged(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    before = jax.device_count()
    devices.use_all_cores()
    assert jax.device_count() == before
