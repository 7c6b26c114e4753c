"""Puts the values of `train` together: defaults, preset, earlier run, YAML file, command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_lora.cli.base_model import BUNDLED
from jax_lora.cli.options import DEFAULTS, given, make_settings, read_config_file
from jax_lora.cli.presets import PRESETS
from jax_lora.cli.train_flags import PLACES
from jax_lora.errors import ConfigError, format_error
from jax_lora.finetune import recipe
from jax_lora.finetune.run_folder import read_run_config
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.training_state import find_resumable

# Two ways of saying one thing: the one that is said later wins.
RIVALS = (("alpha", "scale"), ("iters", "epochs"))
DEFAULT_RUN = "adapters"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was asked for.

    Args:
      model: Folder of the model; None for the bundled one.
      data: Folder or file of the rows; None for the bundled ones.
      run: Folder of the run.
      progress: How the run is shown.
      settings: What to do.
      checkpoint: Where to go on from, or None.
    """

    model: str | None
    data: str | None
    run: str
    progress: str
    settings: TrainSettings
    checkpoint: Path | None = None


def choose(options: argparse.Namespace) -> Choice:
    """Put the values together.

    Args:
      options: The parsed command line.

    Returns:
      What was asked for.

    Raises:
      ConfigError: Values that contradict each other or mean nothing.
    """
    names = [*DEFAULTS, *PLACES]
    typed = given(options, names)
    if options.model_folder is not None:
        typed["model"] = options.model_folder
    written = read_config_file(options.config, names) if options.config else {}
    checkpoint = _checkpoint(options.resume, typed, written)
    earlier = {} if checkpoint is None else read_run_config(checkpoint)
    layers: list[Mapping[str, Any]] = [earlier or _preset(options.preset), written, typed]
    for source, layer in (("-c", written), ("the command line", typed)):
        _refuse_rivals(source, layer)
    model = _layered(layers).get("model")
    if model in (None, BUNDLED) and not earlier and options.preset is None:
        layers = [recipe.BUNDLED, *layers]
    values = _layered(layers)
    if checkpoint is not None and earlier:  # it is still in the folder of its run
        values["adapter_path"] = str(checkpoint.parent)
    places = {name: values.pop(name, None) for name in PLACES}
    return Choice(
        model=places["model"],
        data=places["data"],
        run=places["adapter_path"] or DEFAULT_RUN,
        progress=places["progress"] or "auto",
        settings=make_settings(values),
        checkpoint=checkpoint,
    )


def _checkpoint(
    resume: str | None, typed: Mapping[str, Any], written: Mapping[str, Any]
) -> Path | None:
    if resume is None:
        return None
    run = typed.get("adapter_path") or written.get("adapter_path") or DEFAULT_RUN
    checkpoint = find_resumable(run if resume == "auto" else resume)
    if checkpoint is None and resume != "auto":
        raise ConfigError(
            format_error(
                f"--resume {resume}",
                got="no run with a checkpoint there",
                expected="the folder of a run, or one of its checkpoints",
                fix="Check the path. --resume without a path resumes the run in --adapter-path, "
                "or starts it.",
            )
        )
    return checkpoint


def _preset(name: str | None) -> Mapping[str, Any]:
    return PRESETS[name] if name else {}


def _layered(layers: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay values over each other; what is said later takes the place of its rival too."""
    values: dict[str, Any] = {}
    for layer in layers:
        said = {name: value for name, value in layer.items() if value is not None}
        for pair in RIVALS:
            for one, other in (pair, pair[::-1]):
                if one in said and other not in said:
                    values.pop(other, None)
        values |= said
    return values


def _refuse_rivals(source: str, layer: Mapping[str, Any]) -> None:
    for one, other in RIVALS[:1]:
        if layer.get(one) is not None and layer.get(other) is not None:
            raise ConfigError(
                format_error(
                    f"--{one} and --{other} in {source}",
                    got=f"{layer[one]!r} and {layer[other]!r}",
                    expected="one of them: the scale is alpha / rank",
                    fix="Leave one out.",
                )
            )
