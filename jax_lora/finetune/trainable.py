"""The trainable parameters of a run: an adapter on frozen variables, or all variables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora import paths
from jax_lora.adapter import Adapter, combine
from jax_lora.checkpoint import load_adapter, save_adapter
from jax_lora.errors import CheckpointError, StructureError
from jax_lora.storage import array_store

ARRAYS = "variables"


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The frozen and the trainable half of a model.

    Args:
      frozen: The frozen half: the base model's variables, or nothing.
      start: The trainable half before the first step.
      join: Combines both: `(frozen, trainable) -> variables`.
      save: Writes the trainable half: `(folder, trainable)`.
      load: Reads it: `folder -> trainable`.
      in_place: Whether training donates `start`, because a second copy would be too large.
    """

    frozen: Any
    start: Any
    join: Callable[[Any, Any], Any]
    save: Callable[[Path, Any], None]
    load: Callable[[Path], Any]
    in_place: bool = False

    @property
    def size(self) -> int:
        """Count the trainable parameters."""
        if isinstance(self.start, Adapter):
            return self.start.size  # without the padding of ranks
        return sum(leaf.size for leaf in jax.tree.leaves(self.start))


def as_trainable(variables: Any, adapter: Any) -> Trainable:
    """Split a model into the frozen and the trainable half.

    Args:
      variables: The base model's variables.
      adapter: An adapter, or None to train all variables; a `Trainable` is returned unchanged.

    Raises:
      StructureError: `adapter` is of another type.
    """
    if isinstance(adapter, Trainable):
        return adapter
    if adapter is None:
        return all_variables(variables)
    if isinstance(adapter, Adapter):
        return train_adapter(variables, adapter)
    raise StructureError(
        "adapter",
        got=f"a {type(adapter).__name__}",
        expected="an adapter, or None to train all variables",
        fix="Pass the result of jl.lora_init; jl.partition splits a combined tree.",
    )


def train_adapter(variables: Any, adapter: Adapter) -> Trainable:
    """Train an adapter, with the checkpoints of `save_adapter`."""
    return Trainable(
        frozen=variables,
        start=adapter,
        join=combine,
        save=functools.partial(save_adapter, base=variables),
        load=functools.partial(load_adapter, base=variables),
    )


def all_variables(variables: Any) -> Trainable:
    """Train every floating-point leaf; a checkpoint is an Orbax folder of arrays by path."""
    named, treedef = paths.flatten_with_paths(variables)
    order = [path for path, _ in named]
    trained = {path: leaf for path, leaf in named if jnp.issubdtype(leaf.dtype, jnp.floating)}
    frozen = {path: leaf for path, leaf in named if path not in trained}

    def join(frozen: Any, trainable: Any) -> Any:
        both = frozen | trainable
        return jax.tree.unflatten(treedef, [both[path] for path in order])

    def save(folder: Path, trainable: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        array_store.write_arrays(folder / ARRAYS, jax.tree.map(np.asarray, trainable))

    def load(folder: Path) -> Any:
        like = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in trained.items()}
        try:
            found = array_store.read_arrays(folder / ARRAYS, like)
        except Exception as error:  # Orbax raises exceptions of many types
            raise _unreadable(folder, f"{type(error).__name__}: {str(error)[:200]}") from error
        for path, want in like.items():
            if (found[path].shape, found[path].dtype) != (want.shape, want.dtype):
                got = f"{path}: {found[path].dtype} {found[path].shape}"
                raise _unreadable(folder, f"{got} instead of {want.dtype} {want.shape}")
        return jax.tree.map(jnp.asarray, found)

    return Trainable(frozen, trained, join, save, load)


def _unreadable(folder: Path, got: str) -> CheckpointError:
    return CheckpointError(
        str(folder),
        got=got,
        expected="a checkpoint of these variables",
        fix="Resume with the model of the original run.",
    )
