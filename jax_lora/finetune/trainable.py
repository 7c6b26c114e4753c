"""What a run trains: an adapter beside a frozen base, or every parameter of the model itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.adapter import combine
from jax_lora.checkpoint import load_adapter, save_adapter
from jax_lora.finetune.settings import TrainSettings
from jax_lora.init import lora_init
from jax_lora.models import load, save
from jax_lora.models.families import family_of
from jax_lora.models.tokenizer_files import copy_companions
from jax_lora.transform import find_kernels


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The two halves of a model in training, and what is done with them.

    Args:
      frozen: What never changes: the base, or nothing.
      start: What is trained, as it is before the first step.
      join: Puts both together: `(frozen, trained) -> ` what the model is applied to.
      save: Writes what is trained: `(folder, trained)`.
      load: Reads it again: `folder -> trained`.
      in_place: Whether training takes `start` over, as a second copy would be too much.
    """

    frozen: Any
    start: Any
    join: Callable[[Any, Any], Any]
    save: Callable[[Path, Any], None]
    load: Callable[[Path], Any]
    in_place: bool = False

    @property
    def size(self) -> int:
        """Count the numbers that are trained."""
        return getattr(self.start, "size", None) or _count(self.start)


def make_trainable(
    model: Any, variables: Any, settings: TrainSettings, *, folder: Path | None = None
) -> Trainable:
    """Choose what a run trains.

    Args:
      model: A decoder of `jax_lora.models`.
      variables: `{"params": params}`.
      settings: The kind of fine-tuning; rank, scale, targets and seed of an adapter.
      folder: Where the model came from: its tokenizer goes into every whole model that is saved.

    Returns:
      The adapter and the base, or the model alone.
    """
    if settings.fine_tune_type == "full":
        return _whole_model(model, variables, folder)
    return _adapter(model, variables, settings)


def _adapter(model: Any, variables: Any, settings: TrainSettings) -> Trainable:
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    kernels = find_kernels(model.apply, variables, ids)
    config = settings.lora_config(depth_of(model))
    adapter = lora_init(jax.random.key(settings.seed), variables, config, kernels=kernels)
    return Trainable(
        frozen=variables,
        start=adapter,
        join=combine,
        save=functools.partial(_save_adapter, variables),
        load=lambda folder: load_adapter(folder, base=variables),
    )


def depth_of(model: Any) -> int:
    """Count the layers of a model's one stack; 0 where there are two."""
    name = family_of(model).depth
    return 0 if name is None else getattr(model.config, name)


def _save_adapter(base: Any, folder: Path, adapter: Any) -> None:
    save_adapter(folder, adapter, base=base)


def _whole_model(model: Any, variables: Any, source: Path | None) -> Trainable:
    dtype = jax.tree.leaves(variables)[0].dtype

    def write(folder: Path, trained: Any) -> None:
        save(folder, model, trained["params"])
        if source is not None:
            copy_companions(source, folder)

    return Trainable(
        frozen={},
        start=variables,
        join=lambda _, trained: trained,
        save=write,
        load=lambda folder: {"params": load(folder, dtype=dtype)[1]},
        in_place=True,
    )


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
