"""Load the base model of a subcommand, with its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora import bundled
from jax_lora.cli.model_pin import check_model
from jax_lora.data.tokenizer_identity import tokenizer_identity
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
      variables: `{"params": params}`, in which a new classification head is zero.
      start: The same, but a new classification head has its random initial values.
      tokenizer: A `Tokenizer` for causal-lm, else an `EncoderTokenizer`.
    """

    name: str
    task: str
    model: Any
    variables: Any
    start: Any
    tokenizer: Any

    @property
    def dtype(self) -> str:
        """Return the name of the parameters' dtype."""
        return str(jax.tree.leaves(self.variables)[0].dtype)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Return hashes of the tokenizer, the chat template and the end tokens."""
        return tokenizer_identity(model_folder(self.name), self.model.config.eos_token_id)

    @property
    def size(self) -> int:
        """Count the parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables))


def model_folder(name: str | None) -> Path:
    """Find the folder of a model, and check it against `--pin`.

    Args:
      name: The folder; None or `"bundled"` means the one in the package.

    Returns:
      The folder.

    Raises:
      ModelError: It differs from what is pinned.
    """
    folder = bundled.model_path() if name in (None, BUNDLED) else Path(str(name))
    check_model(folder)
    return folder


def data_folder(name: str | None) -> Path:
    """Return the data's path; None and `"bundled"` mean the data set in the package."""
    return bundled.data_path() if name in (None, BUNDLED) else Path(str(name))


def load_base(
    name: str | None,
    dtype: str = "auto",
    *,
    remat: bool | str = "none",
    attention: str = "auto",
    task: str = "auto",
    labels: Sequence[str] = (),
    seed: int = 0,
) -> BaseModel:
    """Load a model and its tokenizer, and prepare both for a task.

    Args:
      name: A Hugging Face folder, or None for the bundled model.
      dtype: A dtype, such as `"bfloat16"`, or `"auto"`: float32 on a CPU, where other dtypes are
        slow, and the dtype of the files on other devices.
      remat: What layers keep for the backward pass.
      attention: The attention kernel.
      task: The task; `"auto"`: the default task of the architecture for data without labels.
      labels: Names of the classes, for classification.
      seed: Random seed of a new head.

    Returns:
      The model.

    Raises:
      ModelError: The folder cannot be read.
      StructureError: A special token has no embedding in the model.
    """
    use_compile_cache()
    folder = model_folder(name)
    if dtype == "auto":
        chosen = jnp.float32 if jax.default_backend() == "cpu" else None
    else:
        chosen = jnp.dtype(dtype)
    task = choose_task(task, read_config(folder))
    tokenizer = tokenizer_for(task, folder)
    model, params = load(folder, dtype=chosen, remat=remat, attention=attention)
    roles = ("bos_id", "eos_id", "mask_id")
    special = {role: getattr(tokenizer, role, None) or 0 for role in roles}
    role, index = max(special.items(), key=lambda item: item[1])
    if index >= model.config.vocab_size:
        raise StructureError(
            format_error(
                str(folder),
                got=f"a tokenizer whose {role.removesuffix('_id')} token is number {index}",
                expected=f"a token of the model's vocabulary of {model.config.vocab_size}",
                fix="Copy the tokenizer from the model's own folder.",
            )
        )
    ready, frozen, start = prepare_model(task, model, params, tuple(labels), seed=seed)
    shown = BUNDLED if name in (None, BUNDLED) else str(folder)
    return BaseModel(shown, task, ready, {"params": frozen}, {"params": start}, tokenizer)


def load_base_of_run(
    name: str, settings: Mapping[str, Any], command: str = "", tasks: Sequence[str] = TASKS
) -> BaseModel:
    """Load the base model of a run, in the task and dtype of that run.

    Args:
      name: The model's folder.
      settings: From the run's config.yaml; they may be empty.
      command: The subcommand, for messages.
      tasks: The tasks that the subcommand supports.

    Returns:
      The model.

    Raises:
      ModelError: The model is for another task. The weights are not loaded.
    """
    folder = model_folder(name)
    task = choose_task(settings.get("task", "auto"), read_config(folder))
    if task not in tasks:
        raise ModelError(
            format_error(
                f"{command} {folder}",
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
