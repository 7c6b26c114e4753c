"""Family: what loading and saving need to know of one architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Family", "nullable", "plain_json"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Args:
      model_type: Its name in `config.json`.
      architectures: The transformers classes whose files can be loaded, the usual one first.
      config: The class of its configurations.
      module: The Linen module, called with a configuration.
      to_json: From a configuration to the fields of `config.json` that it sets.
      fields: From `config.json` to further arguments of the configuration, beyond those that
        have the same name there.
      settle: Completes a configuration by the contents of the files; its second argument is a
        function from a tensor's name to its values, or None if there is no such tensor.
      neutral: Field of `config.json` -> the values with which it changes nothing here.
      harmless: Fields that change nothing, whatever their value.
      redundant: Patterns of tensors that files may hold although they are not needed.
      tied_copies: The same, for a model whose embedding is tied to the output head.
      prefix: The prefix that files of the model without its head omit from tensor names.
      renames: Patterns in tensor names of older files, and their replacements.
      embedding: Path of the token embedding, (vocabulary, hidden).
      head: Path of the output head of an untied model, (hidden, vocabulary); None if the head
        cannot be untied.
      head_bias: Path of the head's bias, if it has one.
      decodes: Whether `generate` can continue a prompt with it.
      depth: The configuration's field with the number of layers; None for two layer stacks.
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


def nullable(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Make a reader of fields in which null is a value, different from an absent field.

    Example:
      >>> nullable("window")({"window": None, "size": 3})
      {'window': None}
    """
    return lambda raw: {name: raw[name] for name in names if name in raw}


def plain_json(config: Any) -> dict[str, Any]:
    """Return every field of a configuration under its own name, as JSON values."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del fields["source"]
    listed = {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}
    return {name: dict(v) if isinstance(v, Mapping) else v for name, v in listed.items()}
