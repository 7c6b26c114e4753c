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
from jax_lora.errors import AdapterFileError, AdapterFileWarning
from jax_lora.storage import schema
from jax_lora.storage.json_files import parse_json, read_json
from jax_lora.storage.limits import limit

CONFIG = "adapter_config.json"
_KEPT = "peft"  # the key in LoraConfig.metadata

# All fields that PEFT 0.21.2 writes for LoRA, with their defaults.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "kasa_config": None,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA",
    "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8, "rank_pattern": {},
    "revision": None, "target_modules": None, "target_parameters": None, "task_type": None,
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False,
    "use_rslora": False, "velora_config": None,
}  # fmt: skip
RANK = schema.integer(1, 2**16)
_LAYER = schema.integer(0, 2**16)
_NAMES = schema.list_of(schema.Kind("a name", lambda value: isinstance(value, str) and value != ""))
_NAMES_OR_ONE = schema.optional(schema.either(schema.TEXT, _NAMES))
_RANGES = schema.list_of(schema.list_of(_LAYER, 2))
_TOKEN_LIST = schema.list_of(schema.integer(0, 2**31 - 1))
_TOKENS = schema.optional(schema.either(_TOKEN_LIST, schema.object_of(_TOKEN_LIST)))
_FLAG = schema.optional(schema.BOOLEAN)
DROPOUT = schema.Kind(
    "a number from 0 to below 1", lambda value: schema.is_number(value) and 0 <= value < 1
)
_FIELDS = schema.fields(
    {
        "r": RANK,
        "rank_pattern": schema.optional(schema.object_of(RANK)),
        "lora_alpha": schema.NUMBER,
        "alpha_pattern": schema.optional(schema.object_of(schema.NUMBER)),
        "lora_dropout": schema.optional(DROPOUT),
        "bias": schema.choice("none", "all", "lora_only"),
        **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying"), _FLAG),
        **dict.fromkeys(("fan_in_fan_out", "inference_mode"), _FLAG),
        **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _NAMES_OR_ONE),
        **dict.fromkeys(("modules_to_save", "target_parameters"), _NAMES_OR_ONE),
        "layers_to_transform": schema.optional(schema.either(_LAYER, schema.list_of(_LAYER))),
        "layer_replication": schema.optional(_RANGES),
        "trainable_token_indices": _TOKENS,
        "init_lora_weights": schema.optional(schema.either(schema.BOOLEAN, schema.TEXT)),
        **dict.fromkeys(
            ("base_model_name_or_path", "revision", "task_type", "peft_version"),
            schema.optional(schema.TEXT),
        ),
        "auto_mapping": schema.optional(schema.OBJECT),
    }
)
# Fields of features that are not implemented -> the values that disable the feature.
_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,), "arrow_config": (None,), "kasa_config": (None,),
    "megatron_config": (None,), "monteclora_config": (None,), "use_bdlora": (None, False),
    "use_qalora": (None, False), "velora_config": (None,),
}  # fmt: skip
# Initializations that also change the base model, so that the file does not have the whole update.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(folder: Path) -> dict[str, Any]:
    """Read all fields of `DEFAULTS` from `adapter_config.json`, or take their defaults.

    Raises:
      AdapterFileError: The file cannot be read, or has invalid or unimplemented settings. One
        message lists all of them.

    Warns:
      AdapterFileWarning: The file has unknown fields.
    """
    raw = read_json(folder / CONFIG, AdapterFileError, "config_bytes")
    problems = list(_problems(raw))
    if problems:
        raise AdapterFileError(
            folder / CONFIG,
            got=problems,
            expected="the configuration of a LoRA adapter that this library supports",
            fix="Save the adapter in PEFT without these settings, or merge it in PEFT.",
        )
    unknown = sorted(set(raw) - set(DEFAULTS) - {"runtime_config"})
    if unknown:
        warnings.warn(
            f"{folder / CONFIG}: unknown fields {', '.join(unknown)}, written by another version "
            "of PEFT, are ignored",
            AdapterFileWarning,
            stacklevel=4,  # the caller of load
        )
    return {**DEFAULTS, **{name: raw[name] for name in raw if name in DEFAULTS}}


def _problems(raw: Mapping[str, Any]) -> Iterator[str]:
    if raw.get("peft_type") != "LORA":
        yield f"peft_type {raw.get('peft_type')!r}: only 'LORA' is implemented"
    for name, neutral in _NOT_IMPLEMENTED.items():
        if not any(raw.get(name) is each for each in neutral):
            yield f"{name} = {schema.shown(raw[name])}: not implemented"
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        yield (
            f"init_lora_weights {start!r}: it also changes the base model; convert it in PEFT with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    yield from schema.problems(raw, _FIELDS)
    ranges = raw.get("layer_replication") or []
    if not any(schema.problems(ranges, _RANGES)):
        total = sum(stop - start for start, stop in ranges)
        if any(start >= stop for start, stop in ranges) or total > limit("layers"):
            shown = schema.shown(ranges)
            expected = f"[start, stop) of at most {limit('layers')} layers together"
            yield f"layer_replication = {shown}: expected a list of {expected}"


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
    """Return the fields of the text that `keep` stored, or None; metadata may be edited."""
    try:
        raw = parse_json(config.metadata.get(_KEPT, ""))
    except (ValueError, RecursionError):
        return None
    return None if any(schema.problems(raw, _FIELDS)) else {**DEFAULTS, **raw}


def forget(config: LoraConfig) -> LoraConfig:
    """Remove the text that `keep` stored."""
    others = {name: text for name, text in config.metadata.items() if name != _KEPT}
    return dataclasses.replace(config, metadata=others)
