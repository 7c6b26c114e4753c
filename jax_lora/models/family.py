"""Family: all that loading and saving have to know of one architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["ROTARY_TABLES", "Family", "decoder_json", "nullable", "plain_json"]

# Tables of rotary frequencies that older files hold.
ROTARY_TABLES = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture, as its file describes it.

    Args:
      model_type: What `config.json` calls it.
      architectures: The classes of transformers whose files fit, the usual one first.
      config: The configuration's class.
      module: The Linen module, called with a configuration.
      to_json: From a configuration to the fields of `config.json` that it governs.
      fields: From `config.json` to further arguments of the configuration, beyond those that
        have the same name there.
      settle: Completes a configuration by what the files hold; it is given a function from a
        tensor's name to its numbers, or None if there is none.
      neutral: Field of `config.json` -> the values with which it changes nothing here.
      harmless: Fields that change nothing whatever their value.
      redundant: Patterns of tensors that files may hold although nothing needs them.
      tied_copies: The same, where the embedding is tied to the output head.
      prefix: What files of the model without its head leave off the tensors' names.
      renames: Patterns in tensors' names and what stands in their place today.
      embedding: Path of the table of tokens, (vocabulary, hidden).
      head: Path of the output head of an untied model, (hidden, vocabulary); None if the head
        cannot be untied.
      head_bias: Path of the head's bias, if it has one.
      decodes: Whether it goes on from a prompt by itself, token by token.
      depth: The configuration's field with the number of layers; None if there are two stacks.
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
    """Make a reader of fields in which null is a value, and not the same as leaving them out.

    Example:
      >>> nullable("window")({"window": None, "size": 3})
      {'window': None}
    """
    return lambda raw: {name: raw[name] for name in names if name in raw}


def plain_json(config: Any) -> dict[str, Any]:
    """Every field of a configuration under its own name, as values that JSON has."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del fields["source"]
    listed = {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}
    return {name: dict(v) if isinstance(v, Mapping) else v for name, v in listed.items()}


def decoder_json(config: Any) -> dict[str, Any]:
    """The same for a decoder, with its rotary settings as old and new readers want them."""
    fields = plain_json(config)
    scaling = fields["rope_scaling"] or {}
    rope = {**scaling, "rope_type": config.rope_type, "rope_theta": config.rope_theta}
    # Transformers 5 reads rope_parameters, its elders the two older fields.
    fields["rope_parameters"] = rope
    fields["rope_scaling"] = {**scaling, "rope_type": config.rope_type} if scaling else None
    return fields
