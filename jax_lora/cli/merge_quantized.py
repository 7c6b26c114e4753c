"""Merge an adapter that was trained on a quantized base model."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_lora import paths
from jax_lora.adapter import combine, is_weight
from jax_lora.cli.adapters import LoadedAdapter, templates_of_run
from jax_lora.cli.base_model import BUNDLED, data_folder, load_base_of_run
from jax_lora.data.data_folder import read_data
from jax_lora.errors import ConfigError, LoraError
from jax_lora.finetune.evaluation import Evaluation
from jax_lora.finetune.tasks import longest_input
from jax_lora.merge import merge
from jax_lora.models.model_kernels import model_kernels
from jax_lora.quantize import QuantizedWeight, dequantize, is_quantized, quantize

ORIGINAL, QUANTIZED = "original", "quantized"
_EXAMPLES = 64  # for the share of the update that is kept
_LONGEST = 2048


def merge_quantized(trained: LoadedAdapter, into: str) -> tuple[LoadedAdapter, Any]:
    """Merge an adapter into the original weights, or into the quantized ones.

    Merged into the quantized weights, an update smaller than a quantization step is lost. The share
    of the update that is kept is measured and printed.

    Returns:
      The adapter with the model that it was merged into, and the merged variables, as arrays.

    Raises:
      ConfigError: The original weights are not in the model's folder.
    """
    if into == QUANTIZED:
        return trained, _into_quantized(trained)
    name, settings = trained.base.name, trained.settings | {"quantize": "none"}
    # The adapter was checked against the quantized weights, which were made from this folder.
    templates = templates_of_run(settings, trained.checkpoint)
    original = load_base_of_run(name, settings, templates=templates)
    if is_quantized(original.variables):
        raise ConfigError(
            f"fuse {name}",
            got="a model that is stored quantized",
            expected="the original weights",
            fix="Add --into quantized, or --model with the folder of the original.",
        )
    trained = dataclasses.replace(trained, base=original)
    return trained, merge(original.variables, trained.adapter)


def _into_quantized(trained: LoadedAdapter) -> Any:
    base = trained.base
    leaves, _ = paths.flatten_with_paths(base.variables, is_leaf=is_weight)
    methods = {path: leaf.method for path, leaf in leaves if isinstance(leaf, QuantizedWeight)}
    merged = dequantize(merge(base.variables, trained.adapter))
    kernels = model_kernels(base.model.apply, merged)
    (method,) = set(methods.values())
    again = quantize(merged, method, targets=tuple(methods), kernels=kernels)
    print(_kept(trained, again))
    return dequantize(again)


def _kept(trained: LoadedAdapter, again: Any) -> str:
    """Describe the share of the loss gain that the quantized weights keep."""
    base, settings = trained.base, trained.settings
    try:
        data = read_data(data_folder(settings.get("data", BUNDLED)))
        file = data.split("valid" if "valid" in data.splits else "train")
    except LoraError as error:
        return f"The kept share of the update was not measured: {error}"
    evaluation = Evaluation(
        dataclasses.replace(file, rows=file.rows[:_EXAMPLES]),
        base.tokenizer,
        task=base.task,
        max_length=min(longest_input(base.model), _LONGEST),
    )
    adapted = combine(base.variables, trained.adapter)
    before, trained_loss, after = (
        evaluation.loss(base.model, each) for each in (base.variables, adapted, again)
    )
    gain = before - trained_loss
    share = f"{(before - after) / gain:.0%}" if gain > 0 else "none"
    return (
        f"Loss on {len(evaluation.file.rows)} examples of {file.path}: base {before:.4f}, "
        f"adapter {trained_loss:.4f}, merged and quantized {after:.4f}: "
        f"{share} of the gain is kept."
    )
