"""The text part of a folder with a vision tower.

`config.json` has the fields of the text model in `text_config`. The files have its tensors under a
prefix, beside those of the vision tower and of the projector. Only the text model is loaded; `save`
copies the other tensors from the folder that the model was loaded from. Adapters have the module
names of the whole model, as PEFT and vLLM expect.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jax_lora.errors import ModelError
from jax_lora.models.family import Family
from jax_lora.models.layout import Layout, Placement
from jax_lora.models.tensor_files import open_tensors
from jax_lora.storage.safetensors_file import LazyTensor

# Where the text model's tensors are: in files as first published, and as transformers 5 names them.
_PREFIXES = ("language_model.model.", "model.language_model.")
_HEADS = ("language_model.lm_head", "lm_head")
_MODULES = "model.language_model."  # in the whole model
_OTHER_PARTS = r"(model\.)?(vision_tower|multi_modal_projector)\..*"
# Fields about images, beside `text_config`.
_IMAGE_FIELDS = frozenset(
    "text_config vision_config image_token_index image_token_id boi_token_index boi_token_id "
    "eoi_token_index eoi_token_id mm_tokens_per_image projector_hidden_act vision_feature_layer "
    "multimodal_projector_bias spatial_merge_size".split()
)
_PLACES = ("text_prefix", "text_head", "folder")  # follow from the folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPartConfig:
    """Where a folder has the text model; `load` sets these fields."""

    text_prefix: str = _PREFIXES[1]  # of its tensors, instead of "model."
    text_head: str = _HEADS[1]  # the name of its output head
    # The folder with the tensors of the other parts; not compared.
    folder: str = dataclasses.field(default="", repr=False, compare=False)


def text_fields(raw: dict[str, Any], family: Family, where: Path) -> dict[str, Any]:
    """Return the fields of the text model, of a `config.json` that may have them in `text_config`.

    Raises:
      ModelError: There is no `text_config`, or its `model_type` is not implemented.
    """
    if not family.text_types:
        return raw
    text = raw.get("text_config")
    found = text.get("model_type", family.text_types[0]) if isinstance(text, dict) else text
    if not isinstance(text, dict) or found not in family.text_types:
        expected = "the fields of a text model of type " + " or ".join(family.text_types)
        got = f"text_config with model_type {found!r}" if isinstance(text, dict) else repr(text)
        raise ModelError(where, got=got, expected=expected, fix="this model is not implemented.")
    outer = {name: value for name, value in raw.items() if name not in _IMAGE_FIELDS}
    ruling = ("model_type", "architectures", "dtype", "torch_dtype", "tie_word_embeddings")
    ruled = {name: outer[name] for name in ruling if outer.get(name) is not None}
    return {**outer, **text, **ruled, "text_type": found}


def settle_text_part(config: Any, read: Callable[[str], Any]) -> Any:
    """Find the names of the text model's tensors, and whether its head is the embedding."""
    prefix = next((p for p in _PREFIXES if read(f"{p}norm.weight") is not None), _PREFIXES[1])
    places = {"text_prefix": prefix}
    for head in _HEADS:
        kernel = read(f"{head}.weight")
        if kernel is None:
            continue
        table = read(f"{prefix}embed_tokens.weight") if config.tie_word_embeddings else None
        places["text_head"] = head
        tied = table is not None and np.array_equal(kernel, table)
        return dataclasses.replace(config, **places, tie_word_embeddings=tied)
    return dataclasses.replace(config, **places, tie_word_embeddings=True)


def text_part_layout(layout: Layout, config: Any) -> Layout:
    """Give the tensors and modules of a text model their names in the whole model."""

    def renamed(name: str, prefix: str, head: str) -> str:
        if name.startswith("lm_head"):
            return head + name.removeprefix("lm_head")
        return prefix + name.removeprefix("model.")

    def placed(old: Placement) -> Placement:
        names = (renamed(each, config.text_prefix, config.text_head) for each in old.tensors)
        module = None if old.module is None else renamed(old.module, _MODULES, "lm_head")
        return dataclasses.replace(old, tensors=tuple(names), module=module)

    return {path: placed(each) for path, each in layout.items()}


def text_part_json(
    to_json: Callable[[Any], dict[str, Any]], text_type: Callable[[Any], str]
) -> Callable[[Any], dict[str, Any]]:
    """Make a writer of `config.json`, from that of the text model's fields and its `model_type`."""

    def write(config: Any) -> dict[str, Any]:
        fields = to_json(config)
        for name in (*_PLACES, "text_type"):
            fields.pop(name, None)
        before = json.loads(config.source).get("text_config", {}) if config.source else {}
        fields["model_type"] = text_type(config)
        tied = {"tie_word_embeddings": fields["tie_word_embeddings"]}
        return {"text_config": {**before, **fields}, **tied}

    return write


def is_other_part(name: str) -> bool:
    """Tell whether a tensor belongs to the vision tower or to the projector.

    Example:
      >>> is_other_part("vision_tower.post_layernorm.bias"), is_other_part("lm_head.weight")
      (True, False)
    """
    return re.fullmatch(_OTHER_PARTS, name) is not None


def other_parts(config: Any) -> dict[str, LazyTensor]:
    """Find the tensors of the other parts, from the folder that the model was loaded from.

    Raises:
      ModelError: The model was not loaded from a folder, or the folder is gone.
    """
    folder = Path(config.folder)
    if not config.folder or not folder.is_dir():
        got = f"the folder {config.folder!r}" if config.folder else "a model that was not loaded"
        expected = "the folder that the model was loaded from, which has the vision tower"
        fix = "load the model again with jl.models.load, and save that one with your parameters."
        raise ModelError("save", got=got, expected=expected, fix=fix)
    return {
        name: LazyTensor(tensor.shape, tensor.numpy_dtype, tensor.read)
        for name, tensor in open_tensors(folder).items()
        if is_other_part(name)
    }
