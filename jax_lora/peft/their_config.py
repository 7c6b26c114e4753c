"""The PEFT configuration of an adapter: the loaded one, or a new one.

A loaded configuration is reused as long as it agrees with the ranks and scales of the pairs. A new
configuration names modules by their last segment if all modules with this segment are adapted, and
by their full name otherwise. Two patterns then never match the same module; PEFT sorts patterns and
uses the first that matches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from jax_lora.adapter import Adapter
from jax_lora.peft.adapter_config import DEFAULTS, kept
from jax_lora.peft.factors import Factors
from jax_lora.peft.hf_modules import Site
from jax_lora.peft.our_config import usual
from jax_lora.peft.scaling import scale_of, value_of
from jax_lora.peft.target_modules import matches
from jax_lora.peft.tied import HEAD

# Fields of a loaded configuration that a new one keeps.
_INFORMATIVE = (
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "layer_replication",
)  # fmt: skip


def their_config(
    adapter: Adapter,
    found: Mapping[str, Factors],
    sites: Mapping[str, Site],
    every: set[str],
    whole: Mapping[str, bool],
    rows: Mapping[str, tuple[int, ...]],
    tied: str | None,
) -> dict[str, Any]:
    """Return all fields of the PEFT configuration of an adapter.

    `every` has all module names, `whole` tells for the modules of fully trained leaves whether only
    their bias is trained, `rows` has the trained tokens by the module of their table, and `tied` is
    the module of the table that is also the output head.
    """
    loaded = kept(adapter.config)
    one_sided = tied in found and not (loaded or {}).get("ensure_weight_tying")
    if loaded is not None and not one_sided and _still_true(loaded, adapter, found, sites):
        for field in ("target_modules", "target_parameters", "modules_to_save"):
            if isinstance(loaded[field], list):
                loaded[field] = sorted(loaded[field])
        return loaded
    config = DEFAULTS | {name: loaded[name] for name in _INFORMATIVE if loaded}
    config |= _numbers(adapter, found)
    modules = [name for name in found if not sites[name].leaf.is_parameter]
    parameters = [name for name in found if sites[name].leaf.is_parameter]
    saved = [name for name, only_bias in whole.items() if not only_bias]
    biased = [name for name, only_bias in whole.items() if only_bias]
    targets = _named(modules, every) + [HEAD] * (tied in found)  # a tied pair changes both modules
    config["target_modules"] = sorted(targets) or None
    config["ensure_weight_tying"] = tied in found or tied in saved
    if parameters:
        config["lora_dropout"] = 0.0  # with another value, PEFT cannot load experts and routers
    config["target_parameters"] = _named(parameters, every, segments=2) or None
    # PEFT ties a saved table to the head only if the list has its full name.
    untied = [name for name in saved if name != tied]
    full = [tied] if tied in saved else []
    config["modules_to_save"] = sorted(_named(untied, every) + full) or None
    if biased:
        config["bias"] = "lora_only" if set(biased) <= set(modules) else "all"
    if rows:
        config["trainable_token_indices"] = {name: list(tokens) for name, tokens in rows.items()}
    return config


def _still_true(
    loaded: Mapping[str, Any],
    adapter: Adapter,
    found: Mapping[str, Factors],
    sites: Mapping[str, Site],
) -> bool:
    """Tell whether a configuration names all modules, with their ranks and scales."""
    for module, factors in found.items():
        site = sites[module]
        names = loaded["target_parameters" if site.leaf.is_parameter else "target_modules"]
        if names is None and site.leaf.is_parameter:
            return False  # loaded from the modules of transformers 4
        if isinstance(names, list) and not any(matches(name, module) for name in names):
            return False
        rank = value_of(loaded["rank_pattern"] or {}, module, loaded["r"])
        if rank != factors.rank or scale_of(loaded, module, factors.rank) != factors.scale:
            return False
    dora = any(each.magnitude is not None for each in found.values())
    bias = any(each.bias is not None for each in found.values())
    same_extras = (bool(loaded["use_dora"]), bool(loaded["lora_bias"])) == (dora, bias)
    return same_extras and (loaded["lora_dropout"] or 0.0) == adapter.config.dropout


def _numbers(adapter: Adapter, found: Mapping[str, Factors]) -> dict[str, Any]:
    rooted = adapter.config.use_rslora
    ranks = {module: each.rank for module, each in found.items()}
    alphas = {
        module: _tidy(each.scale * (math.sqrt(each.rank) if rooted else each.rank))
        for module, each in found.items()
    }
    rank = usual(ranks.values(), adapter.config.rank)
    alpha = usual(alphas.values(), _tidy(adapter.config.alpha))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_rslora": rooted,
        "use_dora": any(each.magnitude is not None for each in found.values()),
        "lora_bias": any(each.bias is not None for each in found.values()),
        "lora_dropout": adapter.config.dropout,
    }


def _tidy(number: float) -> int | float:
    """Round to an integer if the difference is a rounding error."""
    return round(number) if abs(number - round(number)) < 1e-9 * max(1.0, abs(number)) else number


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the values that differ from the default, by last segment if all its values agree."""
    of_segment: dict[str, set[Any]] = {}
    for module, value in values.items():
        of_segment.setdefault(_last(module), set()).add(value)
    return {
        _last(module) if len(of_segment[_last(module)]) == 1 else module: value
        for module, value in values.items()
        if value != default
    }


def _named(modules: Iterable[str], every: set[str], segments: int = 1) -> list[str]:
    """Return names that match exactly these modules: last segments where these are unambiguous."""
    modules = set(modules)
    names = set()
    for module in modules:
        short = _last(module, segments)
        # A vision tower, which is not in `every`, has modules with the same last segments.
        is_part = module.startswith("model.language_model.")
        is_exact = not is_part and all(m in modules for m in every if matches(short, m))
        names.add(short if is_exact else module)
    return sorted(names)


def _last(module: str, segments: int = 1) -> str:
    return ".".join(module.split(".")[-segments:])
