"""`jax-lora doctor` on this system, and on a system with problems."""

import dataclasses
import json

import pytest

from jax_lora.cli import doctor, main, system_info


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_LORA_NO_CACHE", raising=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def look(monkeypatch):
    """Change the system information."""
    real = system_info.collect_system_info()
    well = dataclasses.replace(
        real, drivers=(), disk_free=10**12, memory_free=10**10, memory=2 * 10**10
    )

    def of(**changes):
        monkeypatch.setattr(
            doctor, "collect_system_info", lambda: dataclasses.replace(well, **changes)
        )

    of()
    return of


def test_a_system_without_problems_is_ready(look, capsys, tmp_path):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Ready to train.\n")
    assert "memory            10 GB free of 20 GB" in out
    assert str(tmp_path / "cache") in out


def test_a_gpu_that_jax_does_not_see_is_a_problem(look, capsys):
    look(drivers=("NVIDIA GPU",), environment={})
    assert main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert "PROBLEM: NVIDIA GPU listed by the driver, but not used by JAX\n  fix: pip" in out
    assert "Ready" not in out


def test_json_has_system_information_and_findings(look, capsys):
    look(disk_free=5)
    assert main(["doctor", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["jax"]
    assert found["findings"][0]["what"] == "only 5 B of disk space are free here"
    assert found["cache"]["why_off"] == ""
