"""System information is read on any operating system."""

import os

import jax
import pytest

from jax_lora.cli import system_info
from jax_lora.cli.system_info import collect_system_info


@pytest.fixture
def root(tmp_path):
    """A file system with two NVIDIA GPUs and a container."""
    for gpu in ("0000:00:1e.0", "0000:00:1f.0"):
        (tmp_path / "proc/driver/nvidia/gpus" / gpu).mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    lines = "MemTotal:   16000000 kB\nMemAvailable:    8000000 kB\nHugePages_Total: 0\n"
    (tmp_path / "proc/meminfo").write_text(lines)
    return tmp_path


def test_this_system_has_devices_and_versions(tmp_path):
    found = collect_system_info(run_folder=tmp_path)
    assert found.versions["jax"] == jax.__version__
    assert [device.platform for device in found.devices] == ["cpu"] * len(jax.local_devices())
    assert 0 < found.usable <= found.cores
    assert found.disk_free > 0


def test_memory_and_drivers_are_found(root):
    found = collect_system_info(root, root)
    assert (found.memory, found.memory_free) == (16_384_000_000, 8_192_000_000)
    assert found.drivers == ("NVIDIA GPU",)


def test_the_limits_of_a_container_apply(root):
    (root / "sys/fs/cgroup/memory.max").write_text("4000000000\n")
    (root / "sys/fs/cgroup/memory.current").write_text("1000000000\n")
    (root / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")
    found = collect_system_info(root, root)
    assert (found.memory, found.memory_free, found.usable) == (4 * 10**9, 3 * 10**9, 0.5)


def test_a_container_without_limits_has_those_of_the_machine(root):
    (root / "sys/fs/cgroup/memory.max").write_text("max\n")
    (root / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    found = collect_system_info(root, root)
    assert found.memory == 16_384_000_000
    assert found.usable >= 1


def test_missing_system_files_are_not_an_error(tmp_path):
    found = collect_system_info(tmp_path, tmp_path)
    assert (found.memory, found.memory_free, found.drivers) == (None, None, ())


def test_a_missing_package_has_no_version(monkeypatch, tmp_path):
    monkeypatch.setattr(system_info, "OPTIONAL", {"no-such-package-at-all": "nothing"})
    assert collect_system_info(run_folder=tmp_path).versions["no-such-package-at-all"] is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Unable to initialize backend 'cuda'\nand more"), "Unable to initialize"),
        (AssertionError(), "the requested platform was not found"),
    ],
)
def test_a_missing_platform_is_reported(monkeypatch, tmp_path, error, message):
    def refuse():
        raise error

    monkeypatch.setattr(jax, "local_devices", refuse)
    found = collect_system_info(run_folder=tmp_path)
    assert found.devices == () and found.devices_error.startswith(message)


def test_a_device_reports_its_memory(monkeypatch, tmp_path):
    class Gpu:
        device_kind, platform = "NVIDIA H100", "gpu"

        def memory_stats(self):
            return {"bytes_limit": 80, "bytes_in_use": 30}

    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
    (device,) = collect_system_info(run_folder=tmp_path).devices
    assert (device.name, device.memory, device.free) == ("NVIDIA H100", 80, 50)


def test_only_environment_variables_of_jax_are_listed(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    environment = collect_system_info(run_folder=tmp_path).environment
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert "SECRET_TOKEN" not in environment
    assert "SECRET_TOKEN" in os.environ
