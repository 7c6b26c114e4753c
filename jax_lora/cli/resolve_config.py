"""Resolve the options of `train`: defaults, preset or resumed run, YAML file, command line."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_lora.cli.base_model import BUNDLED
from jax_lora.cli.options import (
    DEFAULTS,
    PLACES,
    given,
    make_settings,
    read_config_file,
    refuse_unknown,
)
from jax_lora.cli.presets import OF_BUNDLED, PRESETS
from jax_lora.data.prompt_template import prompt_template_text
from jax_lora.data.template_files import SUFFIX
from jax_lora.errors import ConfigError
from jax_lora.finetune.resume import refuse_edited_config
from jax_lora.finetune.run_folder import CONFIG, read_run_config
from jax_lora.finetune.run_template import read_run_template
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.training_state import find_resumable, read_record

# Alternatives: setting one of a pair unsets the other.
ALTERNATIVES = (("alpha", "scale"), ("iters", "epochs"))
DEFAULT_RUN = "adapters"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The resolved options of a run.

    Args:
      model: Folder of the model; None for the bundled model.
      data: Folder or file of the examples; None for the bundled data set.
      run: Folder of the run.
      progress: Progress display.
      settings: Settings of the run.
      checkpoint: Checkpoint to resume from, or None.
      chat_template: Text of the chat template of the run to resume, or None.
      asked: Names of the options on the command line and in the YAML file.
    """

    model: str | None
    data: str | None
    run: str
    progress: str
    settings: TrainSettings
    checkpoint: Path | None = None
    chat_template: str | None = None
    asked: frozenset[str] = frozenset()


def choose(options: argparse.Namespace) -> Choice:
    """Resolve the options of the parsed command line.

    Raises:
      ConfigError: Values are invalid, or contradict each other.
    """
    names = [*DEFAULTS, *PLACES]
    typed = given(options, names)
    written = read_config_file(options.config, names) if options.config else {}
    _resolve_templates(typed, escaped=True)  # a shell passes \n as two characters
    _resolve_templates(written, escaped=False)
    checkpoint = _checkpoint(options.resume, typed, written)
    earlier = {} if checkpoint is None else _unedited(checkpoint, names)
    preset = PRESETS[options.preset] if options.preset else {}
    layers: list[Mapping[str, Any]] = [earlier or preset, written, typed]
    for source, layer in (("-c", written), ("the command line", typed)):
        _refuse_alpha_and_scale(source, layer)
    model = _layered(layers).get("model")
    if model in (None, BUNDLED) and not earlier and options.preset is None:
        layers = [OF_BUNDLED, *layers]
    values = _layered(layers)
    if checkpoint is not None and earlier:  # a run is resumed in its own folder
        values["adapter_path"] = str(checkpoint.parent)
    places = {name: values.pop(name, None) for name in PLACES}
    return Choice(
        model=places["model"],
        data=places["data"],
        run=places["adapter_path"] or DEFAULT_RUN,
        progress=places["progress"] or "auto",
        settings=make_settings(values),
        checkpoint=checkpoint,
        chat_template=None
        if checkpoint is None or "chat_template" in typed | written
        else read_run_template(checkpoint.parent),
        asked=frozenset(typed | written),
    )


def _resolve_templates(layer: dict[str, Any], *, escaped: bool) -> None:
    """Read the file of a prompt template, and make the path of a chat template absolute."""
    prompt, chat = layer.get("prompt_template"), layer.get("chat_template")
    if isinstance(prompt, str):
        layer["prompt_template"] = prompt_template_text(prompt, escaped=escaped)
    if isinstance(chat, str) and chat.endswith(SUFFIX):
        layer["chat_template"] = str(Path(chat).resolve())


def _checkpoint(
    resume: str | None, typed: Mapping[str, Any], written: Mapping[str, Any]
) -> Path | None:
    if resume is None:
        return None
    run = typed.get("adapter_path") or written.get("adapter_path") or DEFAULT_RUN
    checkpoint = find_resumable(run if resume == "auto" else resume)
    if checkpoint is None and resume != "auto":
        raise ConfigError(
            f"--resume {resume}",
            got="no run with a checkpoint there",
            expected="the folder of a run, or one of its checkpoints",
            fix="Check the path. --resume without a path resumes the run in --adapter-path, "
            "or starts it.",
        )
    return checkpoint


def _unedited(checkpoint: Path, names: list[str]) -> dict[str, Any]:
    """Read the configuration of the run to resume."""
    config = read_run_config(checkpoint)
    file = checkpoint.parent / CONFIG
    fix = (
        "To continue, restore the file; --iters, --epochs and other options that do not change an "
        "update can be given on the command line. To start a new run with these values: "
        f"jax-lora train -c {shlex.quote(str(file))} --adapter-path NEW_FOLDER"
    )
    refuse_edited_config(checkpoint, config, read_record(checkpoint), fix=fix)
    refuse_unknown(file, config, sorted(names))
    return config


def _layered(layers: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge layers of values; a value in a later layer also removes its alternative."""
    values: dict[str, Any] = {}
    for layer in layers:
        present = {name: value for name, value in layer.items() if value is not None}
        for pair in ALTERNATIVES:
            for one, other in (pair, pair[::-1]):
                if one in present and other not in present:
                    values.pop(other, None)
        values |= present
    return values


def _refuse_alpha_and_scale(source: str, layer: Mapping[str, Any]) -> None:
    alpha, scale = layer.get("alpha"), layer.get("scale")
    if alpha is not None and scale is not None:
        raise ConfigError(
            f"--alpha and --scale in {source}",
            got=f"{alpha!r} and {scale!r}",
            expected="one of them: the scale is alpha / rank",
            fix="Remove one of them.",
        )
