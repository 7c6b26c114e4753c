"""Loads the base model that a verb works on, with its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora import bundled
from jax_lora.errors import ModelError, StructureError, format_error
from jax_lora.finetune.compile_cache import use_compile_cache
from jax_lora.finetune.tasks import (
    CLASSES,
    MASKED,
    TASKS,
    choose_task,
    prepare_model,
    tokenizer_for,
)
from jax_lora.models import load
from jax_lora.models.read_config import read_config

BUNDLED = "bundled"


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A frozen model with its tokenizer, prepared for a task.

    Args:
      name: `"bundled"` or its folder.
      task: One of `jax_lora.finetune.tasks.TASKS`.
      model: The module.
      variables: `{"params": params}`; a new classification head in it is zero.
      start: The same with the random values that training of a new head starts from.
      tokenizer: The tokenizer in the form that the task needs.
    """

    name: str
    task: str
    model: Any
    variables: Any
    start: Any
    tokenizer: Any

    @property
    def dtype(self) -> str:
        """Name the type of the parameters."""
        return str(jax.tree.leaves(self.variables)[0].dtype)

    @property
    def size(self) -> int:
        """Count the parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables))


def model_folder(name: str | None) -> Path:
    """Find the folder of a model; none, or `"bundled"`, means the one in the package."""
    return bundled.model_path() if name in (None, BUNDLED) else Path(str(name))


def data_folder(name: str | None) -> Path:
    """Find the data; none, or `"bundled"`, means those in the package."""
    return bundled.data_path() if name in (None, BUNDLED) else Path(str(name))


def load_base(
    name: str | None,
    dtype: str = "auto",
    *,
    remat: bool = False,
    task: str = "auto",
    labels: Sequence[str] = (),
    seed: int = 0,
) -> BaseModel:
    """Load a model and its tokenizer, and prepare both for a task.

    Args:
      name: A Hugging Face folder, or None for the bundled model.
      dtype: `"float32"`, `"bfloat16"`, or `"auto"`: float32 on a CPU, which is slow with other
        types, and the type of the files on other devices.
      remat: Recompute activations in the backward pass, to save memory.
      task: What the model is for; `"auto"`: what its architecture does without labels.
      labels: Names of the classes, for classification.
      seed: Determines the random values of a new head.

    Returns:
      The model.

    Raises:
      ModelError: The folder cannot be read.
      StructureError: The tokenizer has tokens without an embedding in the model.
    """
    use_compile_cache()
    folder = model_folder(name)
    if dtype == "auto":
        chosen = jnp.float32 if jax.default_backend() == "cpu" else None
    else:
        chosen = jnp.dtype(dtype)
    task = choose_task(task, read_config(folder))
    tokenizer = tokenizer_for(task, folder)
    model, params = load(folder, dtype=chosen, remat=remat)
    if tokenizer.size > model.config.vocab_size:
        raise StructureError(
            format_error(
                str(folder),
                got=f"a tokenizer of {tokenizer.size} tokens",
                expected=f"at most the model's vocabulary of {model.config.vocab_size}",
                fix="Copy the tokenizer from the model's own folder.",
            )
        )
    ready, frozen, start = prepare_model(task, model, params, tuple(labels), seed=seed)
    shown = BUNDLED if name in (None, BUNDLED) else str(folder)
    return BaseModel(shown, task, ready, {"params": frozen}, {"params": start}, tokenizer)


def load_base_of_run(
    name: str, settings: Mapping[str, Any], verb: str = "", tasks: Sequence[str] = TASKS
) -> BaseModel:
    """Load the base model of a run as it was in training.

    Args:
      name: The model's folder.
      settings: From the run's config.yaml; it may be empty.
      verb: What the model is for, for the message of a refusal.
      tasks: The tasks that the verb is for.

    Returns:
      The model.

    Raises:
      ModelError: The model is for another task; nothing has been loaded yet.
    """
    folder = model_folder(name)
    task = choose_task(settings.get("task", "auto"), read_config(folder))
    if task not in tasks:
        raise ModelError(
            format_error(
                f"{verb} {folder}",
                got=f"a model for {task}",
                expected=f"a model for {' or '.join(tasks)}",
                fix=f"Use jax-lora {'predict' if task in (CLASSES, MASKED) else 'generate'}.",
            )
        )
    return load_base(
        name,
        settings.get("dtype", "auto"),
        task=task,
        labels=settings.get("labels", ()),
        seed=settings.get("seed", 0),
    )
