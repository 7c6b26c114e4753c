"""Properties of the package as a whole: the cost of an import, and forbidden contents of files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jax_lora

PACKAGE = Path(jax_lora.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {
    *("transformers", "tokenizers", "rich", "yaml", "matplotlib", "tensorboardX", "torch"),
    "huggingface_hub",
}


def test_importing_brings_no_heavy_or_optional_package_along():
    code = f"import sys, jax_lora; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


PRIVATE_JAX = re.compile(
    r"jax\._src|jax\.interpreters|linear_util|\bDynamicJaxprTracer\b|\bJVPTracer\b|core\.Tracer\("
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_public_jax_is_used(source):
    assert not PRIVATE_JAX.findall(source.read_text(encoding="utf-8"))


UNSAFE = re.compile(
    r"\bpickle\b\.|allow_pickle=True|\beval\(|(?<!\.)\bexec\(|yaml\.load\(|os\.system"
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_runs_code_from_files_is_used(source):
    assert not UNSAFE.findall(source.read_text(encoding="utf-8"))


def test_the_patterns_would_find_what_they_forbid():
    assert PRIVATE_JAX.search("from jax._src import core")
    assert UNSAFE.search("pickle.loads(data)") and UNSAFE.search("x = eval(text)")


def test_every_public_name_is_there_and_documented():
    for name in jax_lora.__all__:
        assert getattr(jax_lora, name).__doc__, name


FLAG = re.compile(r"(?<![-\w])--[a-z][a-z-]+")
LIBRARY = [path for path in SOURCES if path.relative_to(PACKAGE).parts[0] not in ("cli", "plan")]
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@pytest.mark.parametrize("source", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_library_strings_contain_no_command_line_flags(source):
    nodes = list(ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
    docstrings = {
        id(node.body[0].value)
        for node in nodes
        if isinstance(node, DOCUMENTED) and node.body and isinstance(node.body[0], ast.Expr)
    }
    strings = [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]
    assert [text for text in strings if FLAG.search(text)] == []
