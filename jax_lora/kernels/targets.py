"""Select the kernels that a configuration targets; a pattern that matches nothing is an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax_lora import paths
from jax_lora.config import LoraConfig
from jax_lora.errors import LoraError, NoMatchError, SkippedKernelWarning, format_error
from jax_lora.kernels import stacks
from jax_lora.kernels.kernel import Kernel, Kernels, ambiguous, is_floating, kernels_by_name

# Names of modules of Transformer blocks in Flax, Hugging Face and papers.
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
_GROUPS = {"attention": ATTENTION, "mlp": MLP}
_ROUTERS = ("gate", "router")  # beside a module that is named for experts


def select(
    leaves: Mapping[str, Any], config: LoraConfig, kernels: Mapping[str, Kernel] | None
) -> dict[str, Kernel]:
    """Select the kernels that a configuration targets.

    Args:
      leaves: All leaves of the parameters by path.
      config: The configuration.
      kernels: The result of `find_kernels`, or None to find kernels by name and shape.

    Returns:
      The selected kernels by path, sorted by path.

    Raises:
      NoMatchError: A pattern matches no kernel.
      AmbiguousKernelError: The axes of a selected leaf are not known without `find_kernels`.

    Warns:
      SkippedKernelWarning: A target is in `kernels.skipped`.
    """
    found = kernels_by_name(dict(leaves)) if kernels is None else kernels
    known = (found if isinstance(found, Kernels) else Kernels(found)).within(leaves)
    chosen = _chosen(leaves, config, known, guessed=kernels is None)
    _warn_of_skipped(known, config)
    _check_patterns("exclude", config.exclude, known, leaves, config)
    chosen = [p for p in chosen if not _any_matches(config.exclude, p)]
    chosen = [p for p in chosen if not _any_matches(config.modules_to_save, p)]
    if not chosen:
        raise _no_match("exclude", " ".join(config.exclude), known, "everything was excluded")
    selected = stacks.with_active_layers({path: known[path] for path in sorted(chosen)}, config)
    named = dict.fromkeys(stacks.matchable_paths(selected, config))
    _check_patterns("rank_pattern", config.rank_pattern, named, leaves, config)
    _check_patterns("alpha_pattern", config.alpha_pattern, named, leaves, config)
    return selected


def select_whole(leaves: Mapping[str, Any], config: LoraConfig) -> list[str]:
    """Select the leaves that `modules_to_save` trains in full."""
    floating = {path: leaf for path, leaf in leaves.items() if is_floating(leaf)}
    _check_patterns("modules_to_save", config.modules_to_save, floating, leaves, config)
    return sorted(path for path in floating if _any_matches(config.modules_to_save, path))


def _chosen(
    leaves: Mapping[str, Any], config: LoraConfig, known: Mapping[str, Kernel], *, guessed: bool
) -> list[str]:
    routers = find_routers(leaves)
    if config.targets == "all-linear":
        return _all_linear(leaves, known, routers, guessed=guessed)
    if config.targets in _GROUPS:
        # The groups include modules that are themselves named "mlp" or "attention".
        group = _GROUPS[config.targets]
        dense = [path for path, kernel in known.items() if kernel.kind == "dense"]
        chosen = [path for path in dense if _any_matches(group, path) and path not in routers]
        if not chosen:
            raise _no_match(
                "targets", str(config.targets), known, "no dense kernel has such a name"
            )
        return chosen
    patterns = (config.targets,) if isinstance(config.targets, str) else config.targets
    if guessed:
        _refuse_ambiguous(leaves, patterns, known)
    _check_patterns("targets", patterns, known, leaves, config)
    return [path for path in known if _any_matches(patterns, path)]


def find_routers(leaves: Iterable[str]) -> set[str]:
    """Find the routers of mixtures of experts, which only a pattern of their name adapts.

    Args:
      leaves: Paths of all leaves of the parameters.

    Returns:
      The paths of the kernels named "gate" or "router" beside experts.

    Example:
      >>> find_routers(["mlp/gate/kernel", "mlp/experts/down_proj", "gate/kernel"])
      {'mlp/gate/kernel'}
    """
    split = [path.split("/") for path in leaves]
    mixtures = {
        tuple(parts[:i])
        for parts in split
        for i, name in enumerate(parts)
        if name.startswith("expert")
    }
    return {
        "/".join(parts)
        for parts in split
        if any(parts[i] in _ROUTERS and tuple(parts[:i]) in mixtures for i in range(len(parts)))
    }


def _all_linear(
    leaves: Mapping[str, Any], known: Mapping[str, Kernel], routers: set[str], *, guessed: bool
) -> list[str]:
    if guessed:
        for path, leaf in leaves.items():
            if path.split("/")[-1] == "kernel" and is_floating(leaf) and len(leaf.shape) > 2:
                raise ambiguous(path, leaf)
    dense = [path for path, kernel in known.items() if kernel.kind == "dense"]
    if not dense:
        raise _no_match("targets", "all-linear", known, "there is no dense kernel")
    body = [path for path in dense if not known[path].is_output_head and path not in routers]
    return body or dense  # a model that consists of an output head only


def _warn_of_skipped(kernels: Kernels, config: LoraConfig) -> None:
    """Warn about the targets that cannot be adapted."""
    targets = config.targets
    if targets == "all-linear" or targets in _GROUPS:
        # A matrix that is never contracted with data is not a dense kernel.
        wanted = [
            path
            for path in kernels.acting
            if targets == "all-linear" or _any_matches(_GROUPS[str(targets)], path)
        ]
    else:
        patterns = (targets,) if isinstance(targets, str) else targets
        named = (path for path in kernels.skipped if _any_matches(patterns, path))
        wanted = [path for path in named if path not in kernels.added]
    left_out = (*config.exclude, *config.modules_to_save)
    is_settled = lambda path: path in kernels or _any_matches(left_out, path)  # noqa: E731
    wanted = sorted(path for path in wanted if not is_settled(path))
    if wanted:
        warnings.warn(
            format_error(
                f"lora_init: {len(wanted)} targets cannot be adapted",
                got=[f"{path}: {kernels.skipped[path]}" for path in wanted],
                expected="matrices that are contracted with data, looked up or convolved",
                fix="Exclude them to silence this warning, or train them with modules_to_save.",
            ),
            SkippedKernelWarning,
            stacklevel=4,  # the caller of lora_init
        )


def _any_matches(patterns: Iterable[str], path: str) -> bool:
    return any(paths.matches(pattern, path) for pattern in patterns)


def _refuse_ambiguous(
    leaves: Mapping[str, Any], patterns: Sequence[str], known: Mapping[str, Kernel]
) -> None:
    for path, leaf in leaves.items():
        is_vector = path.split("/")[-1] in ("bias", "scale")
        if _any_matches(patterns, path) and path not in known and not is_vector:
            if is_floating(leaf) and len(leaf.shape) > 1:
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
    skipped = getattr(legal, "skipped", {})
    if reasons := [f"{path}: {skipped[path]}" for path in others if path in skipped]:
        why = f"it matches leaves that cannot be adapted: {'; '.join(reasons[:5])}"
    elif others:
        shown = ", ".join(f"{path} {tuple(leaves[path].shape)}" for path in others[:5])
        why = f"it matches only leaves that are not kernels: {shown}"
    else:
        why = "no path has these segments"
    return _no_match(setting, pattern, legal, why)


def _no_match(setting: str, pattern: str, legal: Mapping[str, Any], why: str) -> NoMatchError:
    near = paths.nearest(pattern, legal) or ["none: the function uses no kernel of this tree"]
    return NoMatchError(
        f"LoraConfig: {setting}={pattern!r}",
        got=f"no match among {len(legal)} kernels; {why}",
        expected="a name or glob of at least one kernel; the closest paths are\n"
        + "\n".join(f"              {path}" for path in near),
        fix="Correct the pattern, or remove it.",
    )
