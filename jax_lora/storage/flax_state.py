"""Register the pytree nodes of this library with Flax serialization.

`flax.serialization.to_bytes` and `from_bytes` support registered types only. Registration waits
until Flax is imported, because importing this library does not import Flax.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, TypeVar

Node = TypeVar("Node", bound=type)
_waiting: list[type] = []


def node(cls: Node) -> Node:
    """Register a dataclass, as soon as Flax is imported."""
    _waiting.append(cls)
    return cls


def register() -> None:
    """Register waiting dataclasses if Flax is imported. Called when an adapter is constructed."""
    serialization = sys.modules.get("flax.serialization")
    enter = getattr(serialization, "register_serialization_state", None)
    while enter is not None and _waiting:
        enter(_waiting.pop(), _to_state, _from_state)


def _to_state(node: Any) -> dict[str, Any]:
    to_state_dict = sys.modules["flax.serialization"].to_state_dict
    return {name: to_state_dict(value) for name, value in _data(node).items()}


def _from_state(node: Any, state: dict[str, Any]) -> Any:
    from_state_dict = sys.modules["flax.serialization"].from_state_dict
    data = _data(node)
    if unknown := sorted({*state} ^ {*data}):
        raise ValueError(
            f"A {type(node).__name__} has the fields {', '.join(data)}; the state differs in "
            f"{', '.join(unknown)}."
        )
    restored = {
        name: from_state_dict(value, state[name], name=name) for name, value in data.items()
    }
    return dataclasses.replace(node, **restored)


def _data(node: Any) -> dict[str, Any]:
    """Return the fields with arrays; other fields are part of the treedef."""
    return {
        field.name: value
        for field in dataclasses.fields(node)
        if not field.metadata.get("static") and (value := getattr(node, field.name)) is not None
    }
