"""Equations of a jaxpr: evaluate one, and find its line in the user's code."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
from jax.extend import core as jex_core

_DEBUG_INFO = jex_core.DebugInfo("lora_apply", "lora_apply", None, None)
UNKNOWN = "an unknown location"


def is_literal(var: Any) -> bool:
    """Tell whether an input of an equation is a literal."""
    return isinstance(var, jex_core.Literal)


def evaluate_equation(eqn: Any, *inputs: Any) -> list[Any]:
    """Evaluate one equation on arrays.

    Evaluating a jaxpr of one equation works on every version of JAX, although the ways to bind a
    primitive differ, and keeps name scopes.
    """
    # A dict: a variable may occur twice among the inputs.
    values = {
        var: value for var, value in zip(eqn.invars, inputs, strict=True) if not is_literal(var)
    }
    jaxpr = jex_core.Jaxpr((), list(values), eqn.outvars, [eqn], eqn.effects, _DEBUG_INFO)
    return jax.core.eval_jaxpr(jaxpr, (), *values.values())


def with_operand(position: int, operand: Any, others: Sequence[Any]) -> list[Any]:
    """Insert an operand at its position among the others."""
    return [*others[:position], operand, *others[position:]]


def _package_folder(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return os.path.dirname(spec.origin) + os.sep if spec is not None and spec.origin else None


# Frames of these packages are skipped to find the line of the user's model.
_LIBRARY_FOLDERS = tuple(
    folder
    for folder in map(_package_folder, ("jax", "jaxlib", "flax", "jax_lora", "contextlib"))
    if folder is not None and not folder.endswith(f"python{os.sep}")
)


def location(eqn: Any, called_at: str = UNKNOWN) -> str:
    """Return the `file:line` in the user's code at which an equation was traced.

    It is the innermost frame outside JAX, Flax and this package. Inside a function of a library,
    which has no such frame, it is `called_at`, the location of the call.
    """
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        if not frame.file_name.startswith((*_LIBRARY_FOLDERS, "<")):
            return f"{frame.file_name}:{frame.line_num}"
    return called_at
