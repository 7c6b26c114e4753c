"""Read untrusted YAML files, with limits and one error type."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jax_lora.errors import LoraError
from jax_lora.storage.json_files import read_limited
from jax_lora.storage.limits import limit, limit_hint

_LONGEST_INTEGER = 80  # characters


def read_yaml(
    path: Path, error: type[LoraError], *, expected: str, fix: str, where: str | None = None
) -> dict[str, Any]:
    """Read a YAML mapping with string keys.

    Messages say what is `expected` and how to `fix` it, and call the file `where`, or by its path.

    Raises:
      LoraError: An `error`, if the file is missing, too large, nested too deeply, expands too much
        by aliases, or is not a mapping with different strings as keys.
    """
    data = read_limited(path, error, "yaml_bytes")
    try:
        value = _parse(data.decode("utf-8"))
        problem = _problem(value)
    except Exception as cause:  # the constructors of PyYAML raise many types
        problem = (
            str(cause) if isinstance(cause, ValueError) else f"{type(cause).__name__}: {cause}"
        )
        value, problem = {}, " ".join(problem.split())[:200]
        fix = cause.fix if isinstance(cause, _LimitError) else fix
    if problem is not None:
        raise error(where or str(path), got=problem, expected=expected, fix=fix)
    return value


def _problem(value: Any) -> str | None:
    if not isinstance(value, dict):
        return f"a {type(value).__name__} instead of a mapping"
    wrong = [key for key in value if not isinstance(key, str)]
    return f"the key {wrong[0]!r:.80}, which is not a string" if wrong else None


class _LimitError(ValueError):
    """A document is beyond a limit."""

    def __init__(self, name: str, what: str):
        super().__init__(f"{what} than {limit(name):,}")
        self.fix = limit_hint(name)


def _parse(text: str) -> Any:
    import yaml  # takes a while to import

    loader = _loader()(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(yaml, node, {}, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Composes nodes, which is recursive, to a limited depth."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > limit("json_depth"):
                raise _LimitError("json_depth", "nested more deeply")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    Loader.add_constructor("tag:yaml.org,2002:int", _integer)
    return Loader


def _integer(loader: Any, node: Any) -> int:
    """Refuse integers that other code cannot convert; sexagesimal ones can be very long."""
    if len(loader.construct_scalar(node)) > _LONGEST_INTEGER:
        raise ValueError("an integer of too many digits")
    value = loader.construct_yaml_int(node)
    if abs(value) >= 2**63:
        raise ValueError(f"the integer {value}, which does not fit in 64 bits")
    return value


def _check_size(yaml: Any, node: Any, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """Count nodes, with every alias replaced by what it names; refuse duplicate keys and cycles."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in open_nodes:
        raise ValueError("a value that contains itself")
    open_nodes.add(id(node))
    children = node.value
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in children if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(keys):
            raise ValueError(f"a duplicate key {next(k for k in keys if keys.count(k) > 1)!r:.80}")
        children = [each for pair in children for each in pair]
    size = 1 + sum(_check_size(yaml, each, sizes, open_nodes) for each in children)
    open_nodes.discard(id(node))
    if size > limit("yaml_nodes"):
        raise _LimitError("yaml_nodes", "more values, with aliases expanded,")
    sizes[id(node)] = size
    return size
