"""Read and write `adapter_config.json`, with every field that PEFT has.

A field that enables a feature that is not implemented here is an error. An unknown field, written
by a newer PEFT, is dropped with a warning, as PEFT does.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_lora.config import LoraConfig
from jax_lora.errors import AdapterFileError, AdapterFileWarning, format_error
from jax_lora.storage.json_files import read_json

CONFIG = "adapter_config.json"
_MOST_BYTES = 2**20
_MOST_RANK = 2**16
_MOST_LAYERS = 2**16
_KEPT = "peft"  # the key in LoraConfig.metadata

# All fields that PEFT 0.21.2 writes for LoRA, with their defaults.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Fields of features that are not implemented -> the values that disable the feature.
_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "velora_config": (None,),
}
# Initializations that also change the base model, so that the file does not have the whole update.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Args:
      folder: The folder.

    Returns:
      All fields of `DEFAULTS`, with the values of the file or the defaults.

    Raises:
      AdapterFileError: The file cannot be read, or has invalid or unimplemented settings. One
        message lists all of them.

    Warns:
      AdapterFileWarning: The file has unknown fields.
    """
    raw = read_json(folder / CONFIG, AdapterFileError, _MOST_BYTES)
    problems = list(_problems(raw))
    if problems:
        raise AdapterFileError(
            format_error(
                str(folder / CONFIG),
                got=problems,
                expected="the configuration of a LoRA adapter that this library supports",
                fix="Save the adapter in PEFT without these settings, or merge it in PEFT.",
            )
        )
    unknown = sorted(set(raw) - set(DEFAULTS) - {"runtime_config"})
    if unknown:
        warnings.warn(
            f"{folder / CONFIG}: unknown fields {', '.join(unknown)}, written by another version "
            "of PEFT, are ignored",
            AdapterFileWarning,
            stacklevel=3,  # the caller of load
        )
    return {**DEFAULTS, **{name: raw[name] for name in raw if name in DEFAULTS}}


def _problems(raw: Mapping[str, Any]) -> Iterator[str]:
    if raw.get("peft_type") != "LORA":
        yield f"peft_type {raw.get('peft_type')!r}: only 'LORA' is implemented"
    for name, neutral in _NOT_IMPLEMENTED.items():
        if raw.get(name) not in neutral:
            yield f"{name} = {_short(raw[name])}: not implemented"
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        yield (
            f"init_lora_weights {start!r}: it also changes the base model; convert it in PEFT with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    yield from _type_problems(raw)


def _type_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    ranks = {"r": raw.get("r", 8), **_dict(raw.get("rank_pattern"))}
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _MOST_RANK:
            yield f"rank {name} = {_short(rank)}: expected an integer from 1 to {_MOST_RANK}"
    alphas = {"lora_alpha": raw.get("lora_alpha", 8), **_dict(raw.get("alpha_pattern"))}
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            yield f"alpha {name} = {_short(alpha)}: expected a number"
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(raw.get(name) or {}, dict):
            yield f"{name} = {_short(raw[name])}: expected an object"
    for name in ("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying"):
        if not isinstance(raw.get(name) or False, bool):
            yield f"{name} = {_short(raw[name])}: expected true or false"
    dropout = raw.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        yield f"lora_dropout = {_short(dropout)}: expected a number from 0 to 1"
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        yield f"bias = {_short(raw['bias'])}: expected 'none', 'all' or 'lora_only'"
    for name in ("target_modules", "modules_to_save", "target_parameters"):
        if not _is_names(raw.get(name)):
            yield f"{name} = {_short(raw[name])}: expected a list of names"
    if not _is_ranges(raw.get("layer_replication")):
        shown = _short(raw["layer_replication"])
        yield f"layer_replication = {shown}: expected a list of [start, stop)"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_names(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return True
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_ranges(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and all(
        isinstance(each, list)
        and len(each) == 2
        and all(type(bound) is int for bound in each)
        and 0 <= each[0] < each[1] <= _MOST_LAYERS
        for each in value
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def config_text(config: Mapping[str, Any]) -> str:
    """Return a configuration as JSON, with all fields and sorted keys, like PEFT."""
    return json.dumps({**DEFAULTS, **config}, indent=2, sort_keys=True)


# -----------------------------------------------------------------------------------------------
# The configuration that an adapter was loaded with
# -----------------------------------------------------------------------------------------------


def keep(config: LoraConfig, text: str) -> LoraConfig:
    """Store the text of an `adapter_config.json` in the metadata of a configuration."""
    return dataclasses.replace(config, metadata={**config.metadata, _KEPT: text})


def kept(config: LoraConfig) -> dict[str, Any] | None:
    """Return the fields of the text that `keep` stored, or None."""
    try:
        return {**DEFAULTS, **json.loads(config.metadata.get(_KEPT, ""))}
    except (ValueError, TypeError, RecursionError):
        return None


def forget(config: LoraConfig) -> LoraConfig:
    """Remove the text that `keep` stored."""
    others = {name: text for name, text in config.metadata.items() if name != _KEPT}
    return dataclasses.replace(config, metadata=others)
