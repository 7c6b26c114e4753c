"""Adapters of a model whose embedding is its output head too.

In PEFT the two ends have factors of their own, even where the table is one. Here a tied table is
one leaf, and its pair changes both ends. So an adapter fits a tied model only if it means both ends
alike (`ensure_weight_tying`); any other is for the untied model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_lora.peft import keys
from jax_lora.peft.sites import braces

HEAD = "lm_head"
_UNTIE = (
    "the model is tied, so untie it first: model, params = jax_lora.models.untie(model, params)"
)
_NO_TOKENS = ("wpe", "position_embeddings", "token_type_embeddings")


def tied_table(names: Mapping[str, str]) -> str | None:
    """The module of the table that is the output head too: no kernel stands outside the layers.

    Example:
      >>> tied_table({"embed/embedding": "model.embed", "layers/q/kernel": "model.{layer}.q"})
      'model.embed'
    """
    outside = {path: module for path, module in names.items() if not braces(module)}
    if any(path.split("/")[-1] == "kernel" for path in outside):
        return None
    tables = [module for path, module in outside.items() if path.split("/")[-1] == "embedding"]
    return next((name for name in tables if name.split(".")[-1] not in _NO_TOKENS), None)


def settle(
    grouped: Mapping[str, Mapping[str, np.ndarray]],
    rest: Mapping[str, np.ndarray],
    table: str | None,
    config: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Take the head's tensors of a tied model, which the table's say already, out of the rest.

    Args:
      grouped: Tensors of factors by module.
      rest: The other tensors by name.
      table: The table that is tied, or None.
      config: The configuration.

    Returns:
      What is left of the rest, and what is wrong.
    """
    if table is None:
        return dict(rest), []
    stem = keys.PREFIX + HEAD
    of_head = {name: tensor for name, tensor in rest.items() if name.startswith(f"{stem}.")}
    others = {name: tensor for name, tensor in rest.items() if name not in of_head}
    if not config["ensure_weight_tying"]:
        problems = [
            f"{name}: of the head alone, and the model is tied; {_UNTIE}" for name in of_head
        ]
        if table in grouped:
            problems.append(f"{table}: of the lookup alone, and the model is tied; {_UNTIE}")
        return others, problems
    parts = grouped.get(table, {})
    mirrored = {
        stem + keys.A: parts.get(keys.TABLE_B),
        stem + keys.B: parts.get(keys.TABLE_A),
    }
    problems = []
    for name, mirror in mirrored.items():
        if name in of_head and (mirror is None or not np.array_equal(of_head[name], mirror.T)):
            problems.append(
                f"{name}: other factors than the table's, and the model is tied; {_UNTIE}"
            )
    table_weight = f"{keys.PREFIX}{table}.base_layer.weight"
    copies = {f"{stem}.base_layer.weight", *mirrored}
    problems += [f"extra: {name} {of_head[name].shape}" for name in of_head if name not in copies]
    if f"{stem}.base_layer.weight" in of_head and table_weight not in others:
        others[table_weight] = of_head[f"{stem}.base_layer.weight"]
    return others, problems


def mirror(tensors: Mapping[str, np.ndarray], table: str) -> dict[str, np.ndarray]:
    """The head's tensors that PEFT writes beside a tied table's: its factors, changed about."""
    stem = keys.PREFIX + table
    if stem + keys.TABLE_A not in tensors:
        return {}
    head = keys.PREFIX + HEAD
    return {
        head + keys.A: tensors[stem + keys.TABLE_B].T,
        head + keys.B: tensors[stem + keys.TABLE_A].T,
    }
