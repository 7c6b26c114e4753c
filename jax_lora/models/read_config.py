"""From a checkpoint's `config.json` to a `LlamaConfig`, refusing what is not implemented.

Fields that other members of the family use to change the arithmetic are refused by name: loading
such a model as a plain Llama would give wrong numbers without a word.
"""

import dataclasses
from pathlib import Path
from typing import Any, NoReturn

from jax_lora.errors import ConfigError, ModelError, explain
from jax_lora.models.folder import read_json
from jax_lora.models.llama_config import LlamaConfig

__all__ = ["read_config"]

# Field -> the values that leave the arithmetic alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "use_qk_norm": (None, False),
    "qk_norm": (None, False),
    "attn_temperature_tuning": (None, False),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
_ROPE_FIELDS = ("rope_theta", "rope_scaling")


def read_config(folder: Path) -> LlamaConfig:
    """The configuration of a Hugging Face Llama folder.

    Reads `rope_parameters` (transformers 5) as well as `rope_theta` with `rope_scaling` (before).

    Raises:
      ModelError: for another architecture, a field that changes the arithmetic and is not
        implemented, or a value that `LlamaConfig` refuses; the message names the field.
    """
    raw = read_json(folder, "config.json")
    where = folder / "config.json"
    if raw.get("model_type") != "llama":
        got = f"model_type {raw.get('model_type')!r}"
        _refuse(where, got, "model_type 'llama'", "only the Llama architecture is implemented.")
    for field, neutral in _NEUTRAL.items():
        if raw.get(field) not in neutral:
            got = f"{field} = {raw[field]!r}"
            expected = f"{field} absent or {neutral[-1]!r}"
            _refuse(where, got, expected, "this variant of Llama is not implemented.")
    layer_types = raw.get("layer_types") or []
    if set(layer_types) - {"full_attention"}:
        got = f"layer_types {sorted(set(layer_types))}"
        _refuse(where, got, "'full_attention' only", "this variant of Llama is not implemented.")
    try:
        return LlamaConfig(**_plain_fields(raw), **_rope_fields(raw, where))
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from error


def _plain_fields(raw: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(LlamaConfig)} - set(_ROPE_FIELDS)
    found = {name: raw[name] for name in names if raw.get(name) is not None}
    if isinstance(found.get("eos_token_id"), list):
        found["eos_token_id"] = tuple(found["eos_token_id"])
    return found


def _rope_fields(raw: dict[str, Any], where: Path) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        _refuse(where, f"rope settings {rope!r}", "an object", "fetch the file again.")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or LlamaConfig.rope_theta
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0:
        return {"rope_theta": theta}
    original = rope.get("original_max_position_embeddings")
    original = original or raw.get("original_max_position_embeddings")
    if original is not None:
        rope["original_max_position_embeddings"] = original
    if kind == "yarn" and rope.get("factor") is None and original:
        rope["factor"] = raw.get("max_position_embeddings", original) / original
    return {"rope_theta": theta, "rope_scaling": rope}


def _refuse(where: Path, got: str, expected: str, fix: str) -> NoReturn:
    raise ModelError(explain(str(where), got=got, expected=expected, fix=fix))
