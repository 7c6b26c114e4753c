"""Family: the description of an architecture that loading and saving use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Args:
      model_type: Its name in `config.json`.
      architectures: The transformers classes whose files can be loaded, the usual one first.
      config: The class of its configurations.
      module: The Linen module, called with a configuration.
      to_json: From a configuration to the fields of `config.json` that it sets.
      fields: From `config.json` to arguments of the configuration with another name or format
        there; all others are read by their names.
      settle: Completes a configuration by the tensors of the files. Its second argument is a
        function from the name of a tensor to its values, or to None if there is no such tensor.
      neutral: Field of `config.json` -> the values with which it does not change the outputs.
      harmless: Fields of `config.json` that do not change the outputs with any value.
      redundant: Patterns of tensors in the files that are not needed.
      tied_copies: Patterns of tensors that repeat the embedding, or the bias of the head, if the
        two are tied.
      prefix: The prefix that files of the model without its head omit from tensor names.
      renames: Patterns in tensor names of older files, and their replacements.
      embedding: Path of the token embedding, (vocabulary, hidden).
      head: Path of the output head of an untied model, (hidden, vocabulary); None if the head
        cannot be untied.
      head_bias: Path of the head's bias, if it has one.
      decodes: Whether `generate` can continue a prompt with it.
      depth: The configuration's field with the number of layers; None for two layer stacks.
      text_types: For the text part of a model with a vision tower, the values of `model_type` in
        its `text_config`; see `text_parts`.
    """

    model_type: str
    architectures: tuple[str, ...]
    config: type[Any]
    module: type[Any]
    to_json: Callable[[Any], dict[str, Any]]
    fields: Callable[[dict[str, Any]], dict[str, Any]] = lambda raw: {}
    settle: Callable[[Any, Callable[[str], Any]], Any] = lambda config, read: config
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    redundant: tuple[str, ...] = ()
    tied_copies: tuple[str, ...] = (r"lm_head\.weight",)
    prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    embedding: str = "embed_tokens/embedding"
    head: str | None = "lm_head/kernel"
    head_bias: str | None = None
    decodes: bool = True
    depth: str | None = "num_hidden_layers"
    text_types: tuple[str, ...] = ()


def nullable(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Make a reader of fields in which null is a value, different from an absent field.

    Example:
      >>> nullable("window")({"window": None, "size": 3})
      {'window': None}
    """
    return lambda raw: {name: raw[name] for name in names if name in raw}


def plain_json(config: Any) -> dict[str, Any]:
    """Return all fields of a configuration by name, as JSON values."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del fields["source"]
    listed = {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}
    return {name: dict(v) if isinstance(v, Mapping) else v for name, v in listed.items()}
