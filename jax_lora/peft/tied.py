"""Adapters of a model whose embedding is its output head too.

In PEFT the two ends are modules of their own, even where the table is one, and each may have its
own update. Here a tied table is one leaf, and its update changes both ends. So an adapter fits a
tied model only if it changes both ends alike: then the tensors of the head repeat those of the
table. Any other is for the untied model, which `jl.peft.load_model` makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jax_lora.peft import keys
from jax_lora.peft.hf_modules import braces
from jax_lora.peft.target_modules import listed

HEAD = "lm_head"
UNTIE = "the model is tied; jl.peft.load_model(path, model, params) unties it"
# Tables that are no output head: of positions, of segments, and the tokens of encoders, whose
# head has a kernel of its own in front.
_NO_HEAD = ("wpe", "position_embeddings", "token_type_embeddings", "word_embeddings")
_WHOLE, _FROZEN = ".weight", ".base_layer.weight"
# Tensors of the head that hold the same as the table's of the same name.
_SAME = (_WHOLE, keys.ROWS, keys.ROWS_FROZEN)


@dataclasses.dataclass(frozen=True)
class Ends:
    """The tensors of an adapter, those of a tied head settled.

    Args:
      rest: Tensors that are not factors, without the head's.
      one_sided: Tensors that change one end and not the other, with the reason.
      problems: What else is wrong.
    """

    rest: dict[str, np.ndarray]
    one_sided: list[str]
    problems: list[str]


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
    return next((name for name in tables if name.split(".")[-1] not in _NO_HEAD), None)


def settle(
    grouped: Mapping[str, Mapping[str, np.ndarray]],
    rest: Mapping[str, np.ndarray],
    table: str | None,
    config: Mapping[str, Any],
    base: Callable[[], Any],
) -> Ends:
    """Leave out the head's tensors of a tied model where they repeat the table's.

    Args:
      grouped: Tensors of factors by module.
      rest: The other tensors by name.
      table: The table that is tied, or None.
      config: The configuration.
      base: Returns the base's table, (vocabulary, hidden); it is compared if the file has none.

    Returns:
      The other tensors, and the reasons for which the adapter does not fit.
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
    ends = Ends(others, list(_of_lookup(grouped, others, of_head, table, config)), [])
    factors = grouped.get(table, {}) if config["ensure_weight_tying"] else {}
    for what, tensor in of_head.items():
        if what in (keys.A, keys.B):
            mirrored = factors.get(keys.TABLE_B if what == keys.A else keys.TABLE_A)
            if mirrored is None:
                ends.one_sided.append(f"{HEAD}{what}: of the head alone")
            elif not np.array_equal(tensor, mirrored.T):
                ends.one_sided.append(f"{HEAD}{what}: other factors than the table's")
        elif what in _SAME:
            twin = others.get(keys.PREFIX + table + what)
            if not _equal(tensor, twin, base if what == _WHOLE else None):
                ends.one_sided.append(f"{HEAD}{what}: other values than {table}{what}")
        elif what == _FROZEN:  # the base's own, which is compared as the table's
            others.setdefault(keys.PREFIX + table + what, tensor)
        else:
            ends.problems.append(f"extra: {HEAD}{what} {tensor.shape}")
    return ends


def _of_lookup(
    grouped: Mapping[str, Any],
    others: Mapping[str, Any],
    of_head: Mapping[str, Any],
    table: str,
    config: Mapping[str, Any],
) -> Iterator[str]:
    """Tensors of the table that the head has no counterpart of."""
    # A table that PEFT does not train is loaded into the shared weight, which changes both ends.
    trained = any(table.endswith(name) for name in listed(config["modules_to_save"]))
    if trained and keys.PREFIX + table + _WHOLE in others and _WHOLE not in of_head:
        yield f"{table}{_WHOLE}: of the lookup alone"
    if table in grouped and not config["ensure_weight_tying"]:
        yield f"{table}: factors of the lookup alone"


def _equal(tensor: np.ndarray, twin: np.ndarray | None, base: Callable[[], Any] | None) -> bool:
    """Compare a tensor of the head with the table's, or with the base's own where there is none."""
    if twin is not None:
        return np.array_equal(tensor, twin)
    leaf = None if base is None else base()
    if leaf is None or tensor.shape != tuple(leaf.shape):
        return False
    # Shapes without values cannot be compared further.
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return True
    return np.array_equal(tensor.astype(leaf.dtype), np.asarray(leaf))


def mirror(tensors: Mapping[str, np.ndarray], table: str) -> dict[str, np.ndarray]:
    """The head's tensors that PEFT writes beside a tied table's.

    Args:
      tensors: The adapter's tensors.
      table: The table's module.

    Returns:
      The table itself where it was trained whole, and its factors transposed.
    """
    stem, head = keys.PREFIX + table, keys.PREFIX + HEAD
    mirrored = {}
    if stem + _WHOLE in tensors:
        mirrored[head + _WHOLE] = tensors[stem + _WHOLE]
    if stem + keys.TABLE_A in tensors:
        mirrored[head + keys.A] = tensors[stem + keys.TABLE_B].T
        mirrored[head + keys.B] = tensors[stem + keys.TABLE_A].T
    return mirrored
