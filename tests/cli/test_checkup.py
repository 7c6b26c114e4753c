"""Every problem has a description and a fix."""

import dataclasses
from pathlib import Path

import pytest

from jax_lora.cli.checkup import check
from jax_lora.cli.system_info import CLI_PACKAGES, OPTIONAL, REQUIRED, Device, SystemInfo
from jax_lora.finetune.compile_cache import CompileCache

ALL_THERE = dict.fromkeys((*REQUIRED, *CLI_PACKAGES, *OPTIONAL), "0.10.2")
WELL = SystemInfo(
    versions=ALL_THERE,
    devices=(Device("cpu", "cpu"),),
    devices_error="",
    drivers=(),
    cores=4,
    usable=4.0,
    memory=16 * 10**9,
    memory_free=8 * 10**9,
    disk_free=50 * 10**9,
    environment={},
)
OLD = {"jax": "0.9.1", "jaxlib": "0.9.1"}
CACHE = CompileCache(Path("/cache"))
GPU = (Device("NVIDIA H100", "gpu", 80 * 10**9, 70 * 10**9),)


def without(name):
    return ALL_THERE | {name: None}


def test_a_system_without_problems_has_no_finding():
    assert check(WELL, CACHE) == []
    assert check(dataclasses.replace(WELL, devices=GPU, drivers=("NVIDIA GPU",)), CACHE) == []


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"versions": without("optax")}, "optax is not installed", "pip install 'jax-lora'"),
        (
            {"versions": without("jinja2")},
            "jinja2 (chat templates) is not installed",
            "pip install 'jax-lora[cli]'",
        ),
        (
            {"versions": ALL_THERE | OLD},
            "jax 0.9.1 is older than 0.10",
            "-U jax",
        ),
        ({"versions": ALL_THERE | {"jaxlib": "0.11.0"}}, "jaxlib 0.11.0", "jaxlib==0.10.2"),
        ({"devices_error": "no cuda"}, "JAX found no device: no cuda", "unset JAX_PLATFORMS"),
        (
            {"drivers": ("NVIDIA GPU",)},
            "NVIDIA GPU listed by the driver, but not used by JAX",
            "pip install -U 'jax[cuda13]'",
        ),
        (
            {"drivers": ("NVIDIA GPU",), "environment": {"JAX_PLATFORMS": "cpu"}},
            "not used by JAX",
            "unset JAX_PLATFORMS, now 'cpu'",
        ),
        (
            {"drivers": ("NVIDIA GPU",), "environment": {"CUDA_VISIBLE_DEVICES": ""}},
            "not used by JAX",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        ({"drivers": ("TPU",)}, "TPU listed", "jax[tpu]"),
        ({"disk_free": 10**8}, "100 MB of disk space are free", "--adapter-path"),
        ({"memory_free": 10**8}, "100 MB of memory are free", "jax-lora plan"),
        ({"environment": {"JAX_DISABLE_JIT": "1"}}, "nothing is compiled", "unset JAX_DISABLE_JIT"),
    ],
)
def test_a_finding_that_stops_a_run_is_a_problem(changes, what, fix):
    (finding,) = check(dataclasses.replace(WELL, **changes), CACHE)
    assert finding.stops
    assert what in finding.what and fix in finding.fix


@pytest.mark.parametrize(
    ("changes", "cache", "what"),
    [
        ({"usable": 1.5}, CACHE, "1.5 of 4 cores"),
        ({"versions": without("pyarrow")}, CACHE, "pyarrow (data in .parquet files)"),
        ({"environment": {"JAX_ENABLE_X64": "True"}}, CACHE, "twice the memory"),
        ({}, dataclasses.replace(CACHE, why_off="JAX_LORA_NO_CACHE is set"), "are not cached"),
        ({}, dataclasses.replace(CACHE, why_off="it cannot be written to"), "are not cached"),
    ],
)
def test_a_finding_that_stops_nothing_is_a_note(changes, cache, what):
    (finding,) = check(dataclasses.replace(WELL, **changes), cache)
    assert not finding.stops
    assert what in finding.what and finding.fix


def test_problems_come_before_notes():
    found = check(dataclasses.replace(WELL, usable=1.0, disk_free=0), CACHE)
    assert [finding.stops for finding in found] == [True, False]
