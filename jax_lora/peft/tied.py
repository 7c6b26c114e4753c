"""Adapters of a model whose embedding table is also its output head.

In PEFT the table and the head are separate modules, and each may have an update. In this library a
tied table is one leaf, and its update changes both. An adapter fits a tied model only if the
tensors of the head repeat those of the table. Any other adapter needs the untied model, which
`jl.peft.load_model` creates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jax_lora import paths
from jax_lora.peft import keys
from jax_lora.peft.target_modules import listed

HEAD = "lm_head"
UNTIE = "the model is tied; jl.peft.load_model(path, model, params) unties it"
# Tables that are not output heads: positions, segments, and the tokens of encoders, whose head has
# an additional kernel.
_NO_HEAD = ("wpe", "position_embeddings", "token_type_embeddings", "word_embeddings")
_WHOLE = ".weight"
# Tensors of the head that are equal to those of the table with the same suffix.
_SAME = (_WHOLE, keys.ROWS, keys.ROWS_FROZEN)


@dataclasses.dataclass(frozen=True)
class Ends:
    """The tensors of an adapter without those of a tied head."""

    rest: dict[str, np.ndarray]  # tensors that are not factors, without those of the head
    one_sided: list[str]  # tensors that change only the table or only the head, with reasons
    problems: list[str]  # other problems


def tied_table(names: Mapping[str, str]) -> str | None:
    """Return the module of the table that is also the output head, or None.

    A model is tied if it has a table and no kernel outside its layers.

    Example:
      >>> tied_table({"embed/embedding": "model.embed", "layers/q/kernel": "model.{layer}.q"})
      'model.embed'
    """
    outside = {path: module for path, module in names.items() if not paths.braces(module)}
    if any(path.split("/")[-1] == "kernel" for path in outside):
        return None
    tables = [module for path, module in outside.items() if path.split("/")[-1] == "embedding"]
    return next((name for name in tables if name.split(".")[-1] not in _NO_HEAD), None)


def settle(
    grouped: Mapping[str, Mapping[str, np.ndarray]],
    rest: Mapping[str, np.ndarray],
    table: str | None,
    config: Mapping[str, Any],
    base: Any,
) -> Ends:
    """Remove the tensors of a tied head if they repeat those of the table.

    `grouped` has the factor tensors by module, `rest` the other tensors by name, and `table` is the
    module of the tied table. `base` is that table in the base model, (vocabulary, hidden), for
    comparison if the file does not have it.
    """
    if table is None:
        return Ends(dict(rest), [], [])
    head = keys.PREFIX + HEAD
    of_head = {
        name.removeprefix(head): tensor
        for name, tensor in rest.items()
        if name.startswith(f"{head}.") and not keys.is_copy(name)
    }
    others = {name: each for name, each in rest.items() if not name.startswith(f"{head}.")}
    ends = Ends(others, [], [])
    # PEFT loads a table that it does not train into the shared weight, which changes both modules.
    trained = any(table.endswith(name) for name in listed(config["modules_to_save"]))
    if trained and keys.PREFIX + table + _WHOLE in others and _WHOLE not in of_head:
        ends.one_sided.append(f"{table}{_WHOLE}: changes only the embedding")
    factors = grouped.get(table, {})
    if factors and not config["ensure_weight_tying"]:
        ends.one_sided.append(f"{table}: factors that change only the embedding")
        factors = {}
    for what, tensor in of_head.items():
        if what in (keys.A, keys.B):
            mirrored = factors.get(keys.TABLE_B if what == keys.A else keys.TABLE_A)
            if mirrored is None:
                ends.one_sided.append(f"{HEAD}{what}: changes only the head")
            elif not np.array_equal(tensor, mirrored.T):
                ends.one_sided.append(f"{HEAD}{what}: differs from the factors of the table")
        elif what in _SAME:
            twin = others.get(keys.PREFIX + table + what)
            if not _equal(tensor, twin, base if what == _WHOLE else None):
                ends.one_sided.append(f"{HEAD}{what}: differs from {table}{what}")
        elif what == keys.FROZEN:  # the base weight, which is compared like that of the table
            others.setdefault(keys.PREFIX + table + what, tensor)
        else:
            ends.problems.append(f"extra: {HEAD}{what} {tensor.shape}")
    return ends


def _equal(tensor: np.ndarray, twin: np.ndarray | None, base: Any) -> bool:
    """Compare a tensor of the head with that of the table, or else with the base weight."""
    if twin is not None:
        return np.array_equal(tensor, twin)
    if base is None or tensor.shape != tuple(base.shape):
        return False
    # Shapes without values cannot be compared further.
    if isinstance(base, jax.ShapeDtypeStruct):
        return True
    return np.array_equal(tensor.astype(base.dtype), np.asarray(base))


def mirror(tensors: Mapping[str, np.ndarray], table: str) -> dict[str, np.ndarray]:
    """Return the tensors that PEFT writes for a tied head, which repeat those of the table."""
    stem, head = keys.PREFIX + table, keys.PREFIX + HEAD
    mirrored = {}
    if stem + _WHOLE in tensors:
        mirrored[head + _WHOLE] = tensors[stem + _WHOLE]
    if stem + keys.TABLE_A in tensors:
        mirrored[head + keys.A] = tensors[stem + keys.TABLE_B].T
        mirrored[head + keys.B] = tensors[stem + keys.TABLE_A].T
    return mirrored
