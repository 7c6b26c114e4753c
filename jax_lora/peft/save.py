"""Save an adapter in the format of PEFT.

pairs by path -> factors by module -> tensors by PEFT name -> adapter_model.safetensors
ranks and scales -> adapter_config.json
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jax_lora import paths
from jax_lora.adapter import Adapter
from jax_lora.errors import AdapterFileError, ConfigError, StructureError
from jax_lora.kernels.kernel import Kernel
from jax_lora.peft import keys, vllm, whole_tensors
from jax_lora.peft.adapter_config import config_text
from jax_lora.peft.factors import Factors, split
from jax_lora.peft.hf_modules import Leaf, Site, describe, sites_of
from jax_lora.peft.load import WEIGHTS
from jax_lora.peft.tensor_file import write_files
from jax_lora.peft.their_config import their_config
from jax_lora.peft.tied import HEAD, mirror, tied_table

TARGETS = (None, "vllm")
_TABLES = ("embed_tokens", HEAD)  # for these, PEFT writes the base weight next to the factors


def save(
    path: str | os.PathLike[str],
    adapter: Adapter,
    *,
    names: Mapping[str, str],
    base_model: str | None = None,
    revision: str | None = None,
    base: Any = None,
    target: str | None = None,
) -> None:
    """Save an adapter to a folder for PEFT's `from_pretrained`.

    Saving an unchanged adapter from PEFT reproduces its files byte for byte, except that module
    names are sorted.

    Args:
      path: The folder, created if necessary. An adapter in it is replaced atomically.
      adapter: The adapter.
      names: Path of each kernel -> name of its PyTorch module: `model.hf_names`.
      base_model: Name or path of the base model for `adapter_config.json`; None keeps the name that
        the adapter was loaded with.
      revision: Commit of the base model on the Hub; None keeps that of the loaded adapter.
      base: The base parameters. If given, the base weights of adapted `embed_tokens` and `lm_head`
        modules are also written, as PEFT does. PEFT loads files with and without them.
      target: "vllm" for the restrictions of vLLM: equal ranks, and scales multiplied into B.

    Raises:
      AdapterFileError: A factor has NaN or Inf, the folder cannot be written, experts or routers
        have magnitudes or biases, or vLLM does not support the adapter.
      StructureError: `names` does not have a leaf of the adapter.
      ConfigError: `target` is unknown.
    """
    if target not in TARGETS:
        expected, fix = "None or 'vllm'", "Leave it out for PEFT itself."
        raise ConfigError("target", got=repr(target), expected=expected, fix=fix)
    leaves, sites, found = split_adapter(adapter, names)
    _check_parameters(found, sites)
    if target == "vllm":
        vllm.check(adapter, found, sites)
        adapter, found = vllm.uniform(adapter, found)
    tensors = keys.encode(found, sites)
    whole = _whole(adapter, leaves, set(found), tensors)
    rows = {leaves[p].template: each.indices for p, each in adapter.rows.items()}
    for p, each in adapter.rows.items():
        tensors[keys.PREFIX + leaves[p].template + keys.ROWS] = np.asarray(each.values)
    table, every = tied_table(names), _all_modules(names, leaves)
    config = their_config(adapter, found, sites, every, whole, rows, table)
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    if revision is not None:
        config["revision"] = revision
    if table is not None:
        tensors |= mirror(tensors, table)  # without these tensors, PEFT does not update the head
    _add_tables(tensors, config, sites, base)
    write_files(path, WEIGHTS, tensors, config_text(config))


def _check_parameters(found: Mapping[str, Factors], sites: Mapping[str, Site]) -> None:
    """Raise an `AdapterFileError` for experts and routers with more than factors."""
    problems = [
        f"{module}: a {name}"
        for module, factors in found.items()
        for name in ("magnitude", "bias")
        if sites[module].leaf.is_parameter and getattr(factors, name) is not None
    ]
    if problems:
        raise AdapterFileError(
            "experts and routers",
            got=problems,
            expected="only LoRA factors: PEFT has neither DoRA nor biases of B for them",
            fix="Save the merged model: jl.models.save(path, model, jl.merge(...)).",
        )


def split_adapter(
    adapter: Adapter, names: Mapping[str, str]
) -> tuple[dict[str, Leaf], dict[str, Site], dict[str, Factors]]:
    """Return the leaves of an adapter by path, and their modules and factors by module."""
    leaves = adapted_leaves(adapter, names)
    found: dict[str, Factors] = {}
    for path, leaf in leaves.items():
        if path in adapter.pairs:
            found |= split(adapter.pairs[path], leaf)
    return leaves, sites_of(leaves), found


def adapted_leaves(adapter: Adapter, names: Mapping[str, str]) -> dict[str, Leaf]:
    """Return the leaves of the adapter in the order of `names`; for a bias, that of its module."""
    templates = {p.removeprefix("params/"): name for p, name in names.items()}
    found, problems = {}, []
    for path in (*adapter.pairs, *adapter.whole, *adapter.rows):
        bare = path.removeprefix("params/")
        own = bare if bare in templates else _kernel_beside(bare, templates)
        if own is None:
            near = ", ".join(paths.nearest(bare, templates, 3))
            problems.append(f"{path}: not in names; the closest paths are {near}")
            continue
        prefix = path.removesuffix(bare)
        found[prefix + own] = _describe(prefix + own, templates[own], path, adapter)
    if problems:
        raise StructureError(
            "names",
            got=problems,
            expected="a module name for every leaf of the adapter",
            fix="Pass the names of the model of the adapter: names=model.hf_names.",
        )
    order = {name: place for place, name in enumerate(templates)}
    return dict(sorted(found.items(), key=lambda item: order[item[0].removeprefix("params/")]))


def _kernel_beside(path: str, others: Iterable[str]) -> str | None:
    """Return the kernel or scale in the same layer as a bias."""
    stem = path.rpartition("/")[0]
    beside = (other for other in others if other.rpartition("/")[0] == stem)
    return next(beside, None) if path.endswith("bias") else None


def _describe(own: str, template: str, path: str, adapter: Adapter) -> Leaf:
    if own in adapter.pairs:
        pair = adapter.pairs[own]
        shape, axes = pair.kernel_shape, (pair.in_axes, pair.out_axes, pair.stack_axes)
        kind = "embedding" if own.split("/")[-1] == "embedding" else "dense"
        return describe(own, template, shape, Kernel(own, shape, None, kind, *axes))
    if own in adapter.rows:
        size = max(adapter.rows[own].indices) + 1
        return describe(own, template, (size, adapter.rows[own].values.shape[1]))
    # Of the kernel beside a bias, only the stack is needed.
    return describe(own, template, adapter.whole[own if own in adapter.whole else path].shape)


def _whole(
    adapter: Adapter, leaves: Mapping[str, Leaf], adapted: set[str], tensors: dict[str, np.ndarray]
) -> dict[str, bool]:
    """Add fully trained leaves to the tensors; map modules to whether only a bias is trained."""
    only_bias: dict[str, bool] = {}
    for path, array in adapter.whole.items():
        own = path if path in leaves else _kernel_beside(path, leaves) or path
        tensors |= whole_tensors.write(array, leaves[own], path, adapted)
        for module, _ in leaves[own].modules():
            only_bias[module] = only_bias.get(module, True) and own != path
    return only_bias


def _all_modules(names: Mapping[str, str], leaves: Mapping[str, Leaf]) -> set[str]:
    """Return the names of all modules of `names`, with as many layers as the adapter."""
    depth = max((leaf.shape[0] for leaf in leaves.values() if leaf.depth), default=1)
    return {name.format(layer=i, expert=0) for name in names.values() for i in range(depth)}


def _add_tables(
    tensors: dict[str, np.ndarray], config: Mapping[str, Any], sites: Mapping[str, Any], base: Any
) -> None:
    """Add the base weights of table and head where PEFT does: if `target_modules` lists them."""
    targets = config["target_modules"]
    if base is None or not isinstance(targets, list) or not {*targets} & {*_TABLES}:
        return
    have = {p.removeprefix("params/"): leaf for p, leaf in paths.flatten_with_paths(base)[0]}
    for module, site in sites.items():
        last = module.split(".")[-1]
        if last in _TABLES and (keys.PREFIX + module + keys.ROWS) not in tensors:
            array = np.asarray(have[site.leaf.path.removeprefix("params/")])
            array = array if site.leaf.is_table else array.T
            tensors[f"{keys.PREFIX}{module}{keys.FROZEN}"] = array
            if config["ensure_weight_tying"]:
                tensors[f"{keys.PREFIX}{HEAD}{keys.FROZEN}"] = array
