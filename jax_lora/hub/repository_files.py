"""Choose the files of a repository that are safe and needed: no code, no pickles."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from jax_lora.errors import HubError, LoraError
from jax_lora.hub.hub_name import HubName
from jax_lora.storage.json_files import read_json
from jax_lora.storage.pickled_weights import convert_fix, pickle_names

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_model.safetensors"
WEIGHTS = ".safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    CONFIG,
    ADAPTER_CONFIG,
    "generation_config.json",
    *TOKENIZERS,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
]
# In these patterns * also matches /. `consolidated` has the same weights in another layout.
UNWANTED = ["*/*", "consolidated*.safetensors"]
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
_TEMPLATE = re.compile(r"additional_chat_templates/[\w-]+\.jinja", re.ASCII)


def wanted_files(names: Iterable[str]) -> list[str]:
    """Choose the files to download or upload, sorted, of all files of a repository or folder.

    Example:
      >>> wanted_files(["model.safetensors", "model.py", "pytorch_model.bin", "runs/a.safetensors"])
      ['model.safetensors']
    """
    return sorted(
        name
        for name in names
        if _TEMPLATE.fullmatch(name)
        or (_PLAIN.fullmatch(name) and _matches(name, WANTED) and not _matches(name, UNWANTED))
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_weights(name: HubName, names: Iterable[str]) -> None:
    """Raise if a repository has no model and no adapter in a format that is read.

    Raises:
      HubError: The weights or the configuration are missing.
    """
    present = list(names)
    chosen = wanted_files(present)
    pickles = pickle_names(each for each in present if "/" not in each)
    expected = f"{SINGLE} or {INDEX} with {CONFIG}, or {ADAPTER} with {ADAPTER_CONFIG}"
    if not any(each.endswith(WEIGHTS) for each in chosen):
        got = "no safetensors file"
        fix = "Choose another repository, or another revision with owner/name@revision."
        if pickles:
            got = f"only pickle files, {', '.join(pickles)}, which can run code"
            fix = convert_fix(name.repo, adapter=ADAPTER_CONFIG in chosen)
        raise HubError(name, got=got, expected=expected, fix=fix)
    if CONFIG not in chosen and ADAPTER_CONFIG not in chosen:
        fix = "Choose a repository that transformers or PEFT can load."
        raise HubError(name, got=f"no {CONFIG} or {ADAPTER_CONFIG}", expected=expected, fix=fix)


def is_peft(folder: Path) -> bool:
    """Tell whether a folder has an adapter in the format of PEFT."""
    return {ADAPTER_CONFIG, ADAPTER} <= _names(folder)


def has_weights(folder: Path) -> bool:
    """Tell whether a folder has a configuration and all weights."""
    names = _names(folder)
    if is_peft(folder) or {CONFIG, SINGLE} <= names:
        return True
    if not {CONFIG, INDEX} <= names:
        return False
    try:
        shards = read_json(folder / INDEX, HubError, "index_bytes").get("weight_map")
    except LoraError:
        return False
    return isinstance(shards, dict) and {str(shard) for shard in shards.values()} <= names


def is_complete(folder: Path) -> bool:
    """Tell whether a folder has weights and, for a model, a tokenizer."""
    tokenizer = is_peft(folder) or not _names(folder).isdisjoint(TOKENIZERS)
    return tokenizer and has_weights(folder)


def _names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir() if each.is_file()} if folder.is_dir() else set()
