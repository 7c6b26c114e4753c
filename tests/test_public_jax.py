"""Every Python file of the repository uses only public names of JAX."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("jax_lora", "tests", "scripts", "examples", "benchmarks", "docs")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))


def names_used(source):
    """Dotted names that a program imports or reads, as `jax.lax.scan`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def private(source):
    return [
        name
        for name in names_used(source)
        if name.split(".")[0] in ("jax", "jaxlib")
        and any(part[0] == "_" for part in name.split("."))
        and not name.endswith("__")
    ]


def test_no_private_name_of_jax_is_used():
    found = {str(file.relative_to(ROOT)): private(file.read_text("utf-8")) for file in FILES}
    assert len(found) > 100
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import jax._src.core",
        "from jax._src import core",
        "from jax._src.core import eval_jaxpr",
        "from jax import _src",
        "import jax\njax._src.core.eval_jaxpr",
        "from jaxlib import _jax",
    ],
)
def test_a_private_name_would_be_found(source):
    assert private(source)


def test_public_names_are_let_through():
    assert not private("import jax\nfrom jax import lax\nprint(jax.__version__, lax.scan, _x.jax)")
