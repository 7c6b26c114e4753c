"""Check this system: package versions, devices, memory and disk."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from typing import Any

import jax

import jax_lora
from jax_lora.cli.checkup import Finding, check
from jax_lora.cli.device_map import device_map, map_lines, sum_over_devices
from jax_lora.cli.distributed import AUTO, OFF, add_distributed_option, joined
from jax_lora.cli.parser import Parser
from jax_lora.cli.system_info import OPTIONAL, Device, SystemInfo, collect_system_info
from jax_lora.finetune.compile_cache import CompileCache, find_compile_cache
from jax_lora.finetune.optimization_level import DEFAULT, optimization_level
from jax_lora.plan.units import show_bytes

HELP = "check versions, devices, memory and disk"
EXAMPLE = """\
jax-lora doctor --json
jax-lora doctor --distributed node1:8476,2,0
"""


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    add = parser.section("output").add_argument
    add("--json", action="store_true", help="print one JSON object")
    add_distributed_option(parser.section("several hosts"), nargs="?", const=AUTO)


def run(options: argparse.Namespace) -> int:
    """Print system information and findings, or a map; return 2 if a finding stops a run."""
    if options.distributed != OFF:
        return _check_processes(options)
    info, cache = collect_system_info(), find_compile_cache()
    findings = check(info, cache)
    if options.json:
        print(json.dumps(_as_dict(info, cache, findings), indent=2))
    else:
        print("\n".join([*_info_lines(info, cache), "", *_finding_lines(findings)]))
    return 2 if any(finding.stops for finding in findings) else 0


def _check_processes(options: argparse.Namespace) -> int:
    """Add numbers over the devices of all processes, and print the map in the first process."""
    with joined(options.distributed):
        total, processes = sum_over_devices(), device_map()
        if jax.process_index() == 0 and options.json:
            print(json.dumps({"sum": total, "processes": processes}, indent=2))
        elif jax.process_index() == 0:
            print("\n".join(map_lines(processes, total)))
    return 0


def _info_lines(info: SystemInfo, cache: CompileCache) -> list[str]:
    lines = [_line("python", platform.python_version()), _line("jax-lora", jax_lora.__version__)]
    for name, version in info.versions.items():
        missing = "not installed (optional)" if name in OPTIONAL else "NOT INSTALLED"
        lines.append(_line(name, version or missing))
    lines.append("")
    lines += [_line("device", _device(device)) for device in info.devices]
    lines += [_line("driver lists", driver) for driver in info.drivers]
    lines.append(_line("cores", f"{info.usable:g} of {info.cores} usable"))
    if info.memory is not None and info.memory_free is not None:
        free, total = show_bytes(info.memory_free), show_bytes(info.memory)
        lines.append(_line("memory", f"{free} free of {total}"))
    lines.append(_line("disk here", f"{show_bytes(info.disk_free)} free"))
    state = cache.why_off or f"{show_bytes(cache.size)} of compiled functions"
    lines.append(_line("cache", state))
    lines.append(_line("", str(cache.folder)))
    level = _mesh_level(info)
    level = "XLA's default" if level == DEFAULT else f"{level} for a step on a mesh"
    lines.append(_line("optimization", level))
    lines += [_line("environment", f"{name}={v}") for name, v in info.environment.items()]
    return lines


def _mesh_level(info: SystemInfo) -> str:
    """Return the optimization level of a step on all devices here."""
    platform = info.devices[0].platform if info.devices else "cpu"
    return optimization_level(platform, len(info.devices))


def _line(name: str, value: str) -> str:
    return f"{name:<18}{value}"


def _device(device: Device) -> str:
    if device.memory is None or device.free is None:
        return f"{device.name} ({device.platform})"
    free, total = show_bytes(device.free), show_bytes(device.memory)
    return f"{device.name} ({device.platform}), {free} free of {total}"


def _finding_lines(findings: list[Finding]) -> list[str]:
    lines = []
    for finding in findings:
        lines.append(f"{'PROBLEM' if finding.stops else 'note'}: {finding.what}")
        lines.append(f"  fix: {finding.fix}")
    if not any(finding.stops for finding in findings):
        lines.append("Ready to train.")
    return lines


def _as_dict(info: SystemInfo, cache: CompileCache, findings: list[Finding]) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "jax_lora": jax_lora.__version__,
        **dataclasses.asdict(info),
        "cache": {"folder": str(cache.folder), "why_off": cache.why_off, "bytes": cache.size},
        "optimization_level": _mesh_level(info),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
