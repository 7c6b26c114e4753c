"""The `config.json` of Llama-like decoders: rotary settings, and fields with several spellings."""

from __future__ import annotations

from typing import Any

from jax_lora.errors import ConfigError
from jax_lora.models.decoder_config import FULL, SLIDING
from jax_lora.models.family import nullable, plain_json


def decoder_json(config: Any) -> dict[str, Any]:
    """Return every field of a configuration, with the rotary settings for old and new readers."""
    fields = plain_json(config)
    scaling = fields["rope_scaling"] or {}
    rope = {**scaling, "rope_type": config.rope_type, "rope_theta": config.rope_theta}
    # Transformers 5 reads rope_parameters, older versions the two other fields.
    fields["rope_parameters"] = rope
    fields["rope_scaling"] = {**scaling, "rope_type": config.rope_type} if scaling else None
    return fields


def qwen3_moe_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Read `num_local_experts` (transformers 5) or `num_experts` (before)."""
    found = nullable("sliding_window")(raw)
    experts = raw.get("num_local_experts") or raw.get("num_experts")
    return found | ({"num_experts": experts} if experts is not None else {})


def qwen3_moe_json(config: Any) -> dict[str, Any]:
    """Write the number of experts under both names."""
    return {**decoder_json(config), "num_local_experts": config.num_experts}


def phi3_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Read `partial_rotary_factor`, which may be among the rotary settings."""
    length = raw.get("original_max_position_embeddings")
    found = {} if length is None else {"original_max_position_embeddings": length}
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return found | nullable("partial_rotary_factor")(rope)


def phi3_json(config: Any) -> dict[str, Any]:
    """Write `partial_rotary_factor` among the rotary settings too."""
    fields = decoder_json(config)
    fields["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    return fields


def gemma3_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Read nulls, the pattern of layers, and the two rotary settings.

    Raises:
      ConfigError: If `rope_parameters` are not given for each kind of layer.
    """
    found = nullable("sliding_window", "final_logit_softcapping")(raw)
    pattern = raw.get("_sliding_window_pattern") or raw.get("sliding_window_pattern")
    if pattern is not None:
        found["sliding_window_pattern"] = pattern
    return found | _gemma3_rope(raw)


def _gemma3_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Read one rotary setting per kind of layer (transformers 5); before, there were three fields.

    The older fields have the names of the configuration's, so they need no reader.
    """
    both = raw.get("rope_parameters")
    if not both:
        return {}
    if not isinstance(both, dict) or set(both) - {FULL, SLIDING}:
        expected = f"settings for {FULL} and for {SLIDING}"
        fix = "give settings for each kind of layer, as transformers writes them."
        raise ConfigError("rope_parameters", got=repr(both), expected=expected, fix=fix)
    full, local = dict(both.get(FULL) or {}), dict(both.get(SLIDING) or {})
    thetas = {
        "rope_theta": full.pop("rope_theta", None) or raw.get("rope_theta"),
        "rope_local_base_freq": local.pop("rope_theta", None) or raw.get("rope_local_base_freq"),
    }
    scalings = {
        name: None if rope.get("rope_type", "default") == "default" else rope
        for name, rope in (("rope_scaling", full), ("rope_local_scaling", local))
    }
    return {name: theta for name, theta in thetas.items() if theta is not None} | scalings


def gemma3_json(config: Any) -> dict[str, Any]:
    """Write one rotary setting per kind of layer."""
    fields = decoder_json(config)
    local: dict[str, Any] = dict(fields.pop("rope_local_scaling") or {"rope_type": "default"})
    local["rope_theta"] = config.rope_local_base_freq
    fields["rope_parameters"] = {FULL: fields["rope_parameters"], SLIDING: local}
    return fields


def ministral3_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Read nulls.

    Raises:
      ConfigError: If there are no rotary settings, of which transformers makes a long default.
    """
    if not (raw.get("rope_parameters") or raw.get("rope_scaling")):
        expected, fix = "the rotary settings", "copy them from the config.json of the original."
        raise ConfigError(
            "rope_parameters", got=repr(raw.get("rope_parameters")), expected=expected, fix=fix
        )
    return nullable("sliding_window")(raw)


def mistral3_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Read the fields of the text model: a Mistral's or a Ministral 3's, with their defaults."""
    if raw["text_type"] == "ministral3":
        return ministral3_fields(raw)
    defaults = {
        "vocab_size": 32000,
        "num_hidden_layers": 32,
        "head_dim": 0,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-6,
    }
    given = {name: value for name, value in defaults.items() if raw.get(name) is None}
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not (rope.get("rope_theta") or raw.get("rope_theta")):
        given["rope_theta"] = 10000.0
    return given | nullable("sliding_window")(raw)
