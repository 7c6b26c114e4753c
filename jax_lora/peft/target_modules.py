"""Match the module names of a PEFT configuration.

A list of names matches full module names or their last segments: "q_proj" matches
"...self_attn.q_proj" and not "my_q_proj". A string is a regular expression or "all-linear". It is
not interpreted, because the tensors of the file determine the adapted modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_lora.peft.hf_modules import Site


def matches(name: str, module: str) -> bool:
    """Tell whether a name of a list matches a module.

    Example:
      >>> matches("q_proj", "layers.0.q_proj"), matches("proj", "layers.0.q_proj")
      (True, False)
    """
    return module == name or module.endswith(f".{name}")


def listed(names: str | Sequence[str] | None) -> list[str]:
    """Return the names of a field that is a name, a list of names or null.

    Example:
      >>> listed("lm_head"), listed(None)
      (['lm_head'], [])
    """
    return [names] if isinstance(names, str) else list(names or [])


def expected_modules(config: Mapping[str, Any], sites: Mapping[str, Site]) -> Iterator[str]:
    """Yield the modules that a configuration lists and for which factors are required."""
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
        return True  # a regular expression, which may match this module
    if any(matches(name, module) for name in excluded or []):
        return True
    if any(f".{name}." in f".{module}." for name in saved):
        return True
    layers = config["layers_to_transform"]
    if layers in (None, []):  # an empty list does not restrict the layers
        return False
    layer = layer_of(module, config["layers_pattern"])
    return layer is None or layer not in (layers if isinstance(layers, list) else [layers])


def layer_of(module: str, pattern: str | Sequence[str] | None = None) -> int | None:
    """Return the layer index, the first number in a module name; None outside the layers.

    With `pattern`, a name or names of lists of layers, only a number after one of these counts.

    Example:
      >>> layer_of("model.layers.3.mlp.experts.7.w1")
      3
    """
    segments, names = module.split("."), listed(pattern)
    for before, segment, _ in zip(segments, segments[1:], segments[2:], strict=False):
        if segment.isdigit() and (not names or before in names):
            return int(segment)
    return None
