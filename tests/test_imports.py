"""The direction of imports: every package may import those below it, and nothing above."""

import ast
from pathlib import Path

import pytest

import jax_lora

PACKAGE = Path(jax_lora.__file__).parent

# From the top down. Files of the root are named one by one; `jax_lora/__init__.py` and
# `__main__.py` are entry points, which nothing inside may import.
LAYERS = [
    ["cli"],
    ["plan"],
    ["finetune"],
    ["data", "report"],
    ["peft"],
    ["models"],
    ["checkpoint"],
    ["dropout", "merge"],
    ["sharding"],
    ["init", "merge_biases", "optimizers", "quantize", "summary"],
    ["transform"],
    ["adapter"],
    ["updates"],
    ["algebra", "kernels", "hub", "quantization"],
    ["config"],
    ["storage", "bundled"],
    ["paths", "errors"],
    ["printable"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or _named(path))


def _named(path):
    return not path.stem.startswith("__")


def dotted(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Names of the package's modules that a file imports when it runs, not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.startswith("jax_lora."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax_lora"):
            for each in node.names:
                inner = f"{node.module}.{each.name}"
                yield inner if inner in NAMES else node.module


NAMES = {dotted(path) for path in modules()}


def layer(name):
    return name.split(".")[1]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = layer(dotted(path))
    for name in imported(path):
        assert name != "jax_lora", "import from the module that defines a name"
        there = layer(name)
        assert there == here or LEVEL[there] > LEVEL[here], f"{dotted(path)} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {dotted(path): set(imported(path)) & NAMES for path in modules()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for each in sorted(graph.get(name, ()) - {name}):
            visit(each)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


def test_every_file_name_occurs_once():
    names = [path.name for path in PACKAGE.rglob("*.py") if _named(path)]
    assert sorted(names) == sorted(set(names))
