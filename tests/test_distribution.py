"""The wheel and the sdist are reproducible, and the wheel works where the sources are not."""

import os
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EPOCH = "1700000000"
USE = """
import sys
sys.path.insert(0, sys.argv[1])
import jax_lora as jl
from jax_lora.bundled import model_path
from jax_lora.cli import main
assert jl.__file__.startswith(sys.argv[1]), jl.__file__
model, params = jl.models.load(model_path())
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.data.template_process import TemplateLimits, TemplateProcess
renderer = TemplateProcess("{{ messages[0].content }}", {}, TemplateLimits(60, 2**30, 2**20))
assert renderer.render(['{"messages": [{"content": "hi"}]}']) == [{"text": "hi"}]
sys.exit(main(["data", "check"]))
"""


def build(folder, umask):
    subprocess.run(
        ["sh", "-c", f"umask {umask} && sh scripts/build_dist.sh '{folder}'"],
        cwd=ROOT,
        env=os.environ | {"SOURCE_DATE_EPOCH": EPOCH, "PYTHON": sys.executable},
        check=True,
        capture_output=True,
    )
    return {file.name: file for file in folder.iterdir()}


@pytest.mark.slow
def test_two_builds_are_equal_and_the_wheel_works_on_its_own(tmp_path):
    pytest.importorskip("hatchling")
    first, again = build(tmp_path / "first", "022"), build(tmp_path / "again", "077")
    assert sorted(first) == sorted(again) and len(first) == 2
    for name, file in first.items():
        assert file.read_bytes() == again[name].read_bytes(), name

    wheel = next(file for name, file in first.items() if name.endswith(".whl"))
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "jax_lora").rglob("*.py")}
    assert sources <= set(names)
    assert all(name.startswith(("jax_lora/", "jax_lora-")) for name in names)
    sdist = next(file for name, file in first.items() if name.endswith(".tar.gz"))
    with tarfile.open(sdist) as archive:
        inner = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "SECURITY.md", "pyproject.toml"} <= inner

    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", USE, str(site)], cwd=tmp_path, env=environment, check=True
    )


def test_the_lock_names_exact_versions_of_all_direct_dependencies():
    lock = (ROOT / "requirements" / "ci.txt").read_text().splitlines()
    lines = lines_without_comments(lock)
    assert all(line.count("==") == 1 and " " not in line for line in lines)
    locked = {line.partition("==")[0].replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cli"], *extras["test"]]
    for each in wanted:
        name = each.partition(">")[0].partition("[")[0].lower()
        assert name.replace("_", "-") in locked | {"jax-lora"}, name


def lines_without_comments(lines):
    return [line for line in lines if line and not line.startswith("#")]


def test_the_audit_names_each_finding():
    audit = runpy.run_path(str(ROOT / "scripts" / "audit.py"))
    known = [{"id": "X-1", "fix_versions": ["2.1", "3.0"]}, {"id": "X-2", "fix_versions": []}]
    packages = [
        {"name": "a", "version": "2.0", "vulns": known},
        {"name": "b", "version": "1", "vulns": []},
        {"name": "c", "skip_reason": "not found"},
    ]
    assert audit["findings"]({"dependencies": packages}) == [
        "a 2.0: X-1, fixed in 2.1, 3.0",
        "a 2.0: X-2, fixed in no version",
    ]
