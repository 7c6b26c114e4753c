"""Read a checkpoint's `config.json` into a configuration.

Every field must be one of the configuration's, or one that is known to change nothing. Any other
field raises an error by name: ignoring a field that changes the arithmetic would silently give
wrong outputs.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jax_lora.errors import ConfigError, ModelError
from jax_lora.models.decoder_config import FULL, SLIDING, DecoderConfig
from jax_lora.models.families import FAMILIES
from jax_lora.models.family import Family
from jax_lora.models.folder import read_file
from jax_lora.models.ignored_fields import ignored_fields
from jax_lora.models.text_parts import text_fields
from jax_lora.storage import schema
from jax_lora.storage.json_files import parse_object
from jax_lora.storage.limits import limit, limit_hint

# Field -> the values that do not change the arithmetic of any architecture.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "quantization": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "attention_multiplier": (None,),
    "attention_out_bias": (None, False),
    "rope_interleaved": (None, False),
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
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "tie_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
    "chunk_size_feed_forward": (None, 0),
}
# What a field changes, where that tells how to go on.
_QUANTIZED = (
    "the weights are stored quantized, in a format other than bitsandbytes' NF4 with double "
    "quantization; take the model's original."
)
_EFFECTS = {
    "quantization_config": _QUANTIZED,
    "quantization": _QUANTIZED,
    "compression_config": _QUANTIZED,
    "rope_interleaved": "it pairs neighboring features in the rotary embedding, which changes "
    "every output and is not implemented.",
}
# Fields about files, training, generation and labels, which do not change the arithmetic.
_HARMLESS = frozenset(
    "architectures model_type torch_dtype dtype transformers_version _name_or_path auto_map "
    "use_cache return_dict output_attentions output_hidden_states output_router_logits torchscript "
    "use_bfloat16 use_return_dict gradient_checkpointing tf_legacy_loss _attn_implementation "
    "attn_implementation _attn_implementation_autoset unsloth_version unsloth_fixed _commit_hash "
    "attention_dropout hidden_dropout dropout router_aux_loss_coef router_jitter_noise "
    "initializer_range initializer_factor tokenizer_class finetuning_task problem_type id2label "
    "label2id num_labels _num_labels task_specific_params language license "
    "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id prefix suppress_tokens "
    "begin_suppress_tokens bad_words_ids max_length min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences "
    "output_scores return_dict_in_generate remove_invalid_values exponential_decay_length_penalty "
    "cross_attention_hidden_size pretraining_tp _model_name_or_path output_past "
    "transformers.js_config is_llama_config max_sequence_length model_max_length "
    "_flash_attn_2_enabled _use_flash_attention_2 use_flash_attn "
    "sentence_transformers sbert_ce_default_activation_function".split()
)
STACKS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer")
_LARGEST = 2**31 - 1  # of an integer
_SHOWN_PROBLEMS = 10
_NUMBERS = schema.list_of(schema.NUMBER)
_LABELS = schema.either(schema.object_of(schema.ANYTHING), schema.list_of(schema.ANYTHING))
# Fields that are read for every architecture, before it is known.
_COMMON = {
    "model_type": schema.optional(schema.TEXT),
    "architectures": schema.optional(schema.list_of(schema.TEXT)),
    "torch_dtype": schema.optional(schema.TEXT),
    "dtype": schema.optional(schema.TEXT),
    "id2label": schema.optional(_LABELS),
    "num_labels": schema.optional(schema.integer(0, 2**20)),
    "_num_labels": schema.optional(schema.integer(0, 2**20)),
}
_ROPE_SETTINGS = {
    **dict.fromkeys(("rope_type", "type"), schema.optional(schema.TEXT)),
    **dict.fromkeys(
        "rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings "
        "attention_factor beta_fast beta_slow mscale mscale_all_dim partial_rotary_factor "
        "llama_4_scaling_beta".split(),
        schema.optional(schema.NUMBER),
    ),
    **dict.fromkeys(("short_factor", "long_factor"), schema.optional(_NUMBERS)),
    "truncate": schema.optional(schema.BOOLEAN),
}
_ROPE_KINDS = schema.fields(
    {**_ROPE_SETTINGS, FULL: schema.fields(_ROPE_SETTINGS), SLIDING: schema.fields(_ROPE_SETTINGS)}
)
_ROPE = {
    **dict.fromkeys(("rope_scaling", "rope_parameters", "rope_local_scaling"), _ROPE_KINDS),
    "original_max_position_embeddings": schema.integer(1, _LARGEST),
    "partial_rotary_factor": schema.NUMBER,
}
# Other names of fields, which the architectures read themselves.
_OTHER_NAMES = dict.fromkeys(
    ("num_local_experts", "num_experts", "sliding_window_pattern", "_sliding_window_pattern"),
    schema.integer(0, 2**20),
)
_ROPE_FIELDS = frozenset(
    ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
)


def read_config(folder: Path, ignore: Iterable[str] = ()) -> Any:
    """Read the configuration of a Hugging Face folder, except unknown fields to `ignore`.

    Reads `rope_parameters` (transformers 5) as well as `rope_theta` with `rope_scaling` (before).

    Raises:
      ModelError: If the architecture or a value is not implemented, or a field is unknown.
    """
    data, where = read_file(folder, "config.json"), folder / "config.json"
    raw = parse_object(data, where, ModelError)
    _check_kinds(raw, _COMMON, where)
    family = _family(raw, where)
    fields = text_fields(raw, family, where)
    _check_fields(fields, family, where, frozenset(ignore) | ignored_fields())
    config = arguments_to_config(raw, family, where)
    return dataclasses.replace(config, source=data.decode("utf-8"))


def family_kinds(family: Family) -> dict[str, schema.Kind]:
    """Return the kinds of the fields in `config.json`, by the annotations of the configuration."""
    hints = typing.get_type_hints(family.config)
    kinds = {name: _sized(schema.of_annotation(hints[name])) for name in _names(family)}
    rope = {name: kinds.pop(name) for name in _ROPE_FIELDS & {*kinds}}
    layers = schema.integer(1, limit("layers"))
    kinds |= {name: layers for name in STACKS if name in kinds}
    if "rope_theta" in rope:
        kinds |= {"rope_theta": schema.NUMBER, **_ROPE}
    kinds |= {**_OTHER_NAMES, **_COMMON}
    # Null is an absent field, as transformers writes it.
    return {name: schema.optional(kind) for name, kind in kinds.items()}


def _sized(kind: schema.Kind) -> schema.Kind:
    return schema.integer(-1, _LARGEST) if kind is schema.INTEGER else kind


def _check_kinds(raw: Mapping[str, Any], kinds: Mapping[str, schema.Kind], where: Path) -> None:
    if found := list(schema.problems(raw, schema.fields(kinds))):
        expected = "the fields of a model's configuration"
        layers = [raw[name] for name in STACKS if schema.is_integer(raw.get(name))]
        deep = any(each > limit("layers") for each in layers)
        fix = limit_hint("layers") if deep else "download the file again."
        raise ModelError(where, got=found[:_SHOWN_PROBLEMS], expected=expected, fix=fix)


def arguments_to_config(
    raw: dict[str, Any], family: Family, where: Path = Path("config.json")
) -> Any:
    """Make a configuration from the fields of a `config.json`, without a check for unknown ones.

    Raises:
      ModelError: If a value is out of range or not implemented.
    """
    raw = text_fields(raw, family, where)
    _check_kinds(raw, family_kinds(family), where)
    try:
        return family.config(**_arguments(raw, family, where))
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from error


def _family(raw: dict[str, Any], where: Path) -> Family:
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        got, fix = f"model_type {raw.get('model_type')!r}", "this architecture is not implemented."
        raise ModelError(where, got=got, expected=f"one of {known}", fix=fix)
    named = raw.get("architectures") or family.architectures[:1]
    if not set(named) & set(family.architectures):
        got, fix = f"architectures {named!r}", "this model is not implemented."
        expected = "architectures with " + " or ".join(family.architectures)
        raise ModelError(where, got=got, expected=expected, fix=fix)
    return family


def _check_fields(raw: dict[str, Any], family: Family, where: Path, ignore: frozenset[str]) -> None:
    known = _HARMLESS | {*family.harmless, *_names(family), *_ROPE_FIELDS} | ignore
    neutral = {**_NEUTRAL, **family.neutral}

    def refuse(field: str, note: str = "") -> NoReturn:
        expected = f"{field} absent or {neutral[field][-1]!r}{note}"
        fix = _EFFECTS.get(field, f"this variant of {family.model_type} is not implemented.")
        raise ModelError(where, got=f"{field} = {raw[field]!r}", expected=expected, fix=fix)

    for field in sorted(ignore & neutral.keys() & raw.keys()):
        if raw[field] not in neutral[field]:
            refuse(field, "; it cannot be ignored")
    for field, value in raw.items():
        if field in known or (field == "quantization_config" and _is_nf4(value)):
            continue
        if field == "layer_types" and isinstance(value, list | None):
            if all(each == FULL for each in value or ()):
                continue
        if field in neutral:
            if value not in neutral[field]:
                refuse(field)
        elif value:
            got = f"{field} = {value!r}, which is not known here"
            expected = f"fields of a {family.model_type} that are implemented or change nothing"
            fix = (
                "only if the model's code does not use it for the outputs, load with "
                f"ignore=({field!r},)."
            )
            raise ModelError(where, got=got, expected=expected, fix=fix)


def _is_nf4(value: Any) -> bool:
    """Tell whether the weights are stored in NF4 by bitsandbytes, which `load` reads."""
    expected = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    return isinstance(value, dict) and all(value.get(k) == v for k, v in expected.items())


def _names(family: Family) -> set[str]:
    return {field.name for field in dataclasses.fields(family.config)} - {"source"}


def _arguments(raw: dict[str, Any], family: Family, where: Path) -> dict[str, Any]:
    names = _names(family) - _ROPE_FIELDS
    found = {name: raw[name] for name in names if raw.get(name) is not None}
    found = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
    if issubclass(family.config, DecoderConfig):
        found |= _rope_fields(raw, family, where)
    return found | family.fields(raw)


def _rope_fields(raw: dict[str, Any], family: Family, where: Path) -> dict[str, Any]:
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or family.config.rope_theta
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
