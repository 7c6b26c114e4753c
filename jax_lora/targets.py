"""Targets: which kernels a configuration means, and an error whenever that could be a mistake."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax_lora import layers, paths
from jax_lora.config import LoraConfig
from jax_lora.errors import LoraError, NoMatchError, explain
from jax_lora.kernel import Kernel, ambiguous, is_floating, kernels_by_name

# Names that Flax, Hugging Face and the papers give to the parts of a Transformer block.
ATTENTION = (
    "*attn*",
    "*attention*",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "c_attn",
    "query",
    "key",
    "value",
)
MLP = (
    "mlp",
    "*ffn*",
    "*feed_forward*",
    "*feedforward*",
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "fc1",
    "fc2",
    "wi",
    "wi_*",
    "wo",
    "c_fc",
    "experts",
)


def select(
    leaves: Mapping[str, Any], config: LoraConfig, kernels: Mapping[str, Kernel] | None
) -> dict[str, Kernel]:
    """Choose the kernels that a configuration targets.

    Args:
      leaves: Every leaf of the parameters by path.
      config: What to adapt.
      kernels: What `find_kernels` reported; None to go by shape and name.

    Returns:
      The chosen kernels by path, in the order of their paths.

    Raises:
      NoMatchError: A pattern that matches no kernel.
      AmbiguousKernelError: A chosen leaf whose axes are not known without `find_kernels`.
    """
    known = dict(kernels) if kernels is not None else kernels_by_name(dict(leaves))
    known = {path: kernel for path, kernel in known.items() if path in leaves}
    chosen = _chosen(leaves, config, known, guessed=kernels is None)
    _check_patterns("exclude", config.exclude, known, leaves, config)
    chosen = [p for p in chosen if not any(paths.matches(e, p) for e in config.exclude)]
    chosen = [p for p in chosen if not any(paths.matches(e, p) for e in config.modules_to_save)]
    if not chosen:
        raise _no_match("exclude", " ".join(config.exclude), known, "everything was excluded")
    selected = layers.with_layers({path: known[path] for path in sorted(chosen)}, config)
    names = dict.fromkeys(layers.names(selected, config))
    _check_patterns("rank_pattern", config.rank_pattern, names, leaves, config)
    _check_patterns("alpha_pattern", config.alpha_pattern, names, leaves, config)
    return selected


def select_whole(leaves: Mapping[str, Any], config: LoraConfig) -> list[str]:
    """Choose the leaves that `modules_to_save` trains whole."""
    floating = {path: leaf for path, leaf in leaves.items() if is_floating(leaf)}
    _check_patterns("modules_to_save", config.modules_to_save, floating, leaves, config)
    return sorted(
        path for path in floating if any(paths.matches(p, path) for p in config.modules_to_save)
    )


def _chosen(
    leaves: Mapping[str, Any], config: LoraConfig, known: Mapping[str, Kernel], *, guessed: bool
) -> list[str]:
    if config.targets == "all-linear":
        return _all_linear(leaves, known, guessed=guessed)
    if config.targets in ("attention", "mlp"):
        # A model may well name a module "mlp" or "attention" itself: the group includes it.
        group = ATTENTION if config.targets == "attention" else MLP
        dense = [path for path, kernel in known.items() if kernel.kind == "dense"]
        chosen = [path for path in dense if any(paths.matches(name, path) for name in group)]
        if not chosen:
            raise _no_match(
                "targets", str(config.targets), known, "no dense kernel has such a name"
            )
        return chosen
    patterns = (config.targets,) if isinstance(config.targets, str) else config.targets
    if guessed:
        _refuse_ambiguous(leaves, patterns, known)
    _check_patterns("targets", patterns, known, leaves, config)
    return [path for path in known if any(paths.matches(name, path) for name in patterns)]


def _all_linear(
    leaves: Mapping[str, Any], known: Mapping[str, Kernel], *, guessed: bool
) -> list[str]:
    if guessed:
        for path, leaf in leaves.items():
            if path.split("/")[-1] == "kernel" and is_floating(leaf) and len(leaf.shape) > 2:
                raise ambiguous(path, leaf)
    dense = [path for path, kernel in known.items() if kernel.kind == "dense"]
    if not dense:
        raise _no_match("targets", "all-linear", known, "there is no dense kernel")
    body = [path for path in dense if not known[path].is_output_head]
    return body or dense  # a model that is nothing but a head: adapt that


def _refuse_ambiguous(
    leaves: Mapping[str, Any], patterns: Sequence[str], known: Mapping[str, Kernel]
) -> None:
    for path, leaf in leaves.items():
        named = any(paths.matches(pattern, path) for pattern in patterns)
        if named and path not in known and is_floating(leaf) and len(leaf.shape) > 1:
            bias = path.split("/")[-1] in ("bias", "scale")
            if not bias:
                raise ambiguous(path, leaf)


def _check_patterns(
    setting: str,
    patterns: Iterable[str],
    legal: Mapping[str, Any],
    leaves: Mapping[str, Any],
    config: LoraConfig,
) -> None:
    patterns = list(patterns)
    unused = [p for p in patterns if not any(paths.matches(p, path) for path in legal)]
    for pattern in unused:
        error = _unused(setting, pattern, legal, leaves)
        if not config.allow_unused or len(unused) == len(patterns):
            raise error
        warnings.warn(str(error), stacklevel=2)


def _unused(
    setting: str, pattern: str, legal: Mapping[str, Any], leaves: Mapping[str, Any]
) -> LoraError:
    others = [path for path in leaves if paths.matches(pattern, path)]
    if others:
        shown = ", ".join(f"{path} {tuple(leaves[path].shape)}" for path in others[:5])
        why = f"it matches only leaves that are not kernels: {shown}"
    else:
        why = "no path has these segments"
    return _no_match(setting, pattern, legal, why)


def _no_match(setting: str, pattern: str, legal: Mapping[str, Any], why: str) -> NoMatchError:
    near = paths.nearest(pattern, legal) or ["none: the function consumes no kernel of this tree"]
    return NoMatchError(
        explain(
            f"LoraConfig: {setting}={pattern!r}",
            got=f"no match among {len(legal)} names of kernels; {why}",
            expected="a name or glob of at least one kernel; the nearest are\n"
            + "\n".join(f"              {path}" for path in near),
            fix="Correct the pattern, or leave it out.",
        )
    )
