"""Load the base model of a subcommand, with its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jax_lora import bundled
from jax_lora.adapter import is_weight
from jax_lora.cli.downloads import find_folder
from jax_lora.cli.model_pin import check_model
from jax_lora.data.tokenizer_identity import tokenizer_identity
from jax_lora.errors import ModelError
from jax_lora.finetune.compile_cache import use_compile_cache
from jax_lora.finetune.optimization_level import use_optimization_level
from jax_lora.finetune.tasks import (
    CLASSES,
    MASKED,
    TASKS,
    choose_task,
    prepare_model,
    tokenizer_for,
)
from jax_lora.hub.hub_name import HubName, find_hub_name, parse_hub_name
from jax_lora.models import load, mesh_sharding
from jax_lora.models.mesh_sharding import gather_codes
from jax_lora.models.read_config import read_config
from jax_lora.report.progress_bar import progress_bar

BUNDLED = "bundled"


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A frozen model with its tokenizer, prepared for a task.

    Args:
      name: `"bundled"`, its folder, or its Hub name at a commit.
      folder: The folder with its files.
      task: One of `jax_lora.finetune.tasks.TASKS`.
      model: The module.
      variables: `{"params": params}`, in which a new classification head is zero.
      start: The same, but a new classification head has its random initial values.
      tokenizer: A `Tokenizer` for causal-lm, else an `EncoderTokenizer`.
    """

    name: str
    folder: Path
    task: str
    model: Any
    variables: Any
    start: Any
    tokenizer: Any

    @property
    def dtype(self) -> str:
        """Return the name of the parameters' dtype."""
        return str(jax.tree.leaves(self.variables, is_leaf=is_weight)[0].dtype)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Return hashes of the tokenizer, the chat template and the end tokens."""
        chosen = getattr(self.tokenizer, "chosen_template", None)
        ends = self.model.config.eos_token_id
        return tokenizer_identity(self.folder, ends, chat_template=chosen)

    @property
    def hub_name(self) -> HubName | None:
        """Return the Hub name at the commit that was loaded, or None for a local folder."""
        return None if self.name in (BUNDLED, str(self.folder)) else parse_hub_name(self.name)

    @property
    def place(self) -> str:
        """Return the name for a configuration: an absolute path, unless it is no path."""
        return str(self.folder.resolve()) if self.name == str(self.folder) else self.name

    @property
    def size(self) -> int:
        """Count the parameters."""
        leaves = jax.tree.leaves(self.variables, is_leaf=is_weight)
        return sum(math.prod(leaf.shape) for leaf in leaves)


def model_folder(name: str | None, *, weights: bool = True) -> Path:
    """Find the folder of a model, and check it against `--pin`.

    Args:
      name: The folder or the Hub name; None or `"bundled"` means the one in the package.
      weights: Whether the weights are needed; without them, only a local folder has them.

    Raises:
      ModelError: It differs from what is pinned.
      HubError: The name cannot be found or downloaded.
    """
    folder = (
        bundled.model_path() if name in (None, BUNDLED) else find_folder(str(name), weights=weights)
    )
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
    quantize: str = "none",
    task: str = "auto",
    labels: Sequence[str] = (),
    seed: int = 0,
    templates: Mapping[str, str | None] | None = None,
    mesh: Mesh | None = None,
    progress: str = "auto",
) -> BaseModel:
    """Load a model and its tokenizer, and prepare both for a task.

    Args:
      name: A Hugging Face folder, a Hub name, or None for the bundled model.
      dtype: A dtype, such as `"bfloat16"`, or `"auto"`: float32 on a CPU, where other dtypes are
        slow, and the dtype of the files on other devices.
      remat: What layers keep for the backward pass.
      attention: The attention kernel.
      quantize: `"nf4"`, `"int8"` or `"float8"`; `"none"`: as the folder stores the kernels.
      task: The task; `"auto"`: the default task of the architecture for data without labels.
      labels: Names of the classes, for classification.
      seed: Random seed of a new head.
      templates: `chat_template` and `prompt_template`, as for `Tokenizer.load`.
      mesh: The mesh over which the parameters are sharded; None: one device.
      progress: The progress display, one of `jax_lora.report.reporters.KINDS`.

    Raises:
      ConfigError: A template is given for another task than causal-lm.
      ModelError: The folder cannot be read.
    """
    use_compile_cache()
    if mesh is not None:
        use_optimization_level(jax.default_backend(), mesh.size)
    folder = model_folder(name)
    usual = "float32" if jax.default_backend() == "cpu" else None
    task = choose_task(task, read_config(folder))
    tokenizer = tokenizer_for(task, folder, templates or {})
    with progress_bar(f"Loading {name or BUNDLED}", progress) as advance:
        model, params = load(
            folder,
            dtype=usual if dtype == "auto" else dtype,
            remat=remat,
            attention=attention,
            sharding=None if mesh is None else mesh_sharding(mesh),
            quantize=None if quantize == "none" else quantize,
            advance=advance,
        )
    if mesh is not None:
        params = gather_codes(params, mesh)
    ready, frozen, start = prepare_model(task, model, params, tuple(labels), seed=seed)
    shown = BUNDLED
    if name not in (None, BUNDLED):  # a snapshot of the Hub is in a folder named for its commit
        found = find_hub_name(str(name))
        shown = str(folder) if found is None else f"{found.repo}@{folder.name}"
    return BaseModel(shown, folder, task, ready, {"params": frozen}, {"params": start}, tokenizer)


def load_base_of_run(
    name: str,
    settings: Mapping[str, Any],
    command: str = "",
    tasks: Sequence[str] = TASKS,
    **loading: Any,
) -> BaseModel:
    """Load the base model of a run, in the task and dtype of that run, for a subcommand.

    `settings` are those of the run and may be empty; `loading` are `templates`, `mesh` and
    `progress` of `load_base`.

    Raises:
      ModelError: The model is for another task. The weights are not loaded.
    """
    folder = model_folder(name)
    task = choose_task(settings.get("task", "auto"), read_config(folder))
    if task not in tasks:
        raise ModelError(
            f"{command} {folder}",
            got=f"a model for {task}",
            expected=f"a model for {' or '.join(tasks)}",
            fix=f"Use jax-lora {'predict' if task in (CLASSES, MASKED) else 'generate'}.",
        )
    return load_base(
        name,
        settings.get("dtype", "auto"),
        quantize=settings.get("quantize", "none"),
        task=task,
        labels=settings.get("labels", ()),
        seed=settings.get("seed", 0),
        **loading,
    )
