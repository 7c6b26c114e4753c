"""How Flax's serialization reads and writes adapters, combined trees and their parts.

Flax keeps a registry of the types that `flax.serialization.to_bytes` and `from_bytes` read. The
nodes of this library join it once Flax is loaded: importing this library does not load Flax.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, TypeVar

Node = TypeVar("Node", bound=type)
_waiting: list[type] = []


def node(cls: Node) -> Node:
    """Register a dataclass that is a pytree node, now or as soon as Flax is loaded."""
    _waiting.append(cls)
    return cls


def register() -> None:
    """Let Flax know the nodes, if it is loaded. Adapters and combined leaves call it when made."""
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
    """Return the fields that hold arrays; the others are part of the structure."""
    return {
        field.name: value
        for field in dataclasses.fields(node)
        if not field.metadata.get("static") and (value := getattr(node, field.name)) is not None
    }
