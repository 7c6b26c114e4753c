"""Which modules a configuration's names mean, by PEFT's rules.

A list of names matches whole modules or their last segments: "q_proj" matches "...self_attn.q_proj"
and never "my_q_proj". A string is a regular expression out of a file, or "all-linear": it is not
interpreted, as the file's own tensors say what was adapted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_lora.peft.hf_modules import Site


def matches(name: str, module: str) -> bool:
    """Tell whether a name of a list means a module.

    Example:
      >>> matches("q_proj", "layers.0.q_proj"), matches("proj", "layers.0.q_proj")
      (True, False)
    """
    return module == name or module.endswith(f".{name}")


def listed(names: str | Sequence[str] | None) -> list[str]:
    """The names of a field that holds one name, a list of them or null.

    Example:
      >>> listed("lm_head"), listed(None)
      (['lm_head'], [])
    """
    return [names] if isinstance(names, str) else list(names or [])


def expected_modules(config: Mapping[str, Any], sites: Mapping[str, Site]) -> Iterator[str]:
    """The modules that a configuration names by list, so that factors of each are expected.

    Args:
      config: The configuration.
      sites: Every site of the base by name.

    Yields:
      Names of sites.
    """
    for module, site in sites.items():
        field = "target_parameters" if site.leaf.is_parameter else "target_modules"
        names = config[field]
        if isinstance(names, list) and any(matches(name, module) for name in names):
            if not site.leaf.kernel.in_axes or _left_out(config, module):
                continue
            yield module


def _left_out(config: Mapping[str, Any], module: str) -> bool:
    excluded, saved = config["exclude_modules"], listed(config["modules_to_save"])
    if isinstance(excluded, str):
        return True  # a regular expression out of the file: it may mean this one
    if any(matches(name, module) for name in excluded or []):
        return True
    if any(f".{name}." in f".{module}." for name in saved):
        return True
    layers = config["layers_to_transform"]
    if layers is None or not layers_apply(config):
        return False
    layer = layer_of(module, config["layers_pattern"])
    return layer is None or layer not in (layers if isinstance(layers, list) else [layers])


def layers_apply(config: Mapping[str, Any]) -> bool:
    """Tell whether `layers_to_transform` chooses layers: an empty list chooses all."""
    return config["layers_to_transform"] not in (None, [])


def layer_of(module: str, pattern: str | Sequence[str] | None = None) -> int | None:
    """The index of the layer that a module belongs to: the first number in its name.

    Args:
      module: The module's name.
      pattern: Names of the list of layers; None: whichever comes first.

    Returns:
      The index, or None for a module of no layer.

    Example:
      >>> layer_of("model.layers.3.mlp.experts.7.w1")
      3
    """
    segments = module.split(".")
    names = [pattern] if isinstance(pattern, str) else list(pattern or [])
    for before, segment, _ in zip(segments, segments[1:], segments[2:], strict=False):
        if segment.isdigit() and (not names or before in names):
            return int(segment)
    return None
