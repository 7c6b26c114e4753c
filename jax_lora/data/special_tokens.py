"""Texts of the special tokens that the settings of a tokenizer name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_lora.errors import ModelError
from jax_lora.storage import schema
from jax_lora.storage.json_files import read_json

SETTINGS = "tokenizer_config.json"
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SHOWN_PROBLEMS = 5
_TOKEN = schema.optional(
    schema.either(schema.TEXT, schema.fields({"content": schema.TEXT}, required=("content",)))
)
_SPECIAL = schema.fields({**dict.fromkeys(ROLES, _TOKEN), "tokenizer_class": schema.ANYTHING})

# What a class of tokenizers names where its settings name nothing: BOS, EOS, UNK, SEP, PAD, CLS,
# MASK.
_OF_CLASS = {
    "Bert": (None, None, "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"),
    "Roberta": ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>"),
    "GPT2": ("<|endoftext|>",) * 3,
    "Qwen2": (None, "<|endoftext|>", "<|endoftext|>", None, "<|endoftext|>"),
    "Llama": ("<s>", "</s>", "<unk>"),
    "CodeLlama": ("<s>", "</s>", "<unk>"),
    "Gemma": ("<bos>", "<eos>", "<unk>", None, "<pad>"),
    "T5": (None, "</s>", "<unk>", None, "<pad>"),
}
_OF_MODEL_TYPE = {
    "bert": "Bert",
    "roberta": "Roberta",
    "gpt2": "GPT2",
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2"),
    **dict.fromkeys(("llama", "mistral", "mistral3", "ministral3", "mixtral", "phi3"), "Llama"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "Gemma"),
    "t5": "T5",
}
_MODEL = schema.fields({"model_type": schema.ANYTHING})


def read_settings(file: Path, kind: schema.Kind) -> dict[str, Any]:
    """Read a JSON file of settings; without such a file, there are none.

    Raises:
      ModelError: The file is damaged, or a setting does not fit.
    """
    if not file.is_file():
        return {}
    settings = read_json(file, ModelError)
    problems = list(schema.problems(settings, kind))
    if problems:
        raise ModelError(
            str(file),
            got=problems[:_SHOWN_PROBLEMS],
            expected="a JSON object of settings",
            fix="Copy the file from the model's own folder.",
        )
    return settings


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Read the texts of the special tokens that a folder names, by role such as `"eos_token"`.

    Raises:
      ModelError: A file is damaged, or a token is not a text.
    """
    return {role: text for role, text in _named(folder).items() if text is not None}


def all_special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens of a folder: the named ones, and usual ones for other roles.

    Null for a role means that there is no such token.

    Raises:
      ModelError: A file is damaged, or a token is not a text.
    """
    usual = zip(ROLES, _OF_CLASS.get(tokenizer_kind(folder) or "", ()), strict=False)
    both = dict(usual) | _named(folder)
    return {role: text for role, text in both.items() if text is not None}


def _named(folder: Path) -> dict[str, str | None]:
    settings = read_settings(folder / "special_tokens_map.json", _SPECIAL)
    settings |= read_settings(folder / SETTINGS, _SPECIAL)
    return {role: text_of(settings[role]) for role in ROLES if role in settings}


def tokenizer_kind(folder: Path) -> str | None:
    """Return the class of a folder's tokenizer without `Tokenizer` and `Fast`, such as `"GPT2"`.

    It is that of `tokenizer_config.json`, or the one that is usual for the architecture in
    `config.json`, or None.

    Raises:
      ModelError: A file is damaged.
    """
    name = read_settings(folder / SETTINGS, _SPECIAL).get("tokenizer_class")
    if isinstance(name, str) and name.removesuffix("Fast") not in ("", "PreTrainedTokenizer"):
        return name.removesuffix("Fast").removesuffix("Tokenizer")
    model_type = read_settings(folder / "config.json", _MODEL).get("model_type")
    return _OF_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None


def text_of(token: Any) -> str | None:
    """Return a special token's text: settings write it as a string or as an object."""
    return token["content"] if isinstance(token, dict) else token
