"""Read an adapter that PEFT wrote.

    adapter_config.json        -> which scale each module has
    adapter_model.safetensors  -> factors by module -> pairs by path

Every tensor of the file has its place in the parameters, and every module that the configuration
names has its tensors: whatever does not fit is an error, all of it in one message, and nothing is
loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_lora import paths
from jax_lora.adapter import Adapter, LoraPair
from jax_lora.errors import AdapterFileError, format_error
from jax_lora.kernels.kernel import Kernel
from jax_lora.peft import keys, whole_tensors
from jax_lora.peft.adapter_config import config_text, keep, read_config
from jax_lora.peft.factors import Factors, join
from jax_lora.peft.hf_modules import Leaf, Site, find_leaves, sites_of
from jax_lora.peft.our_config import our_config
from jax_lora.peft.scaling import scale_of
from jax_lora.peft.target_modules import expected_modules
from jax_lora.peft.tensor_file import read_tensors
from jax_lora.peft.tied import UNTIE, settle, tied_table

WEIGHTS = "adapter_model.safetensors"


def load(
    path: str | os.PathLike[str],
    variables: Any,
    *,
    names: Mapping[str, str],
    kernels: Mapping[str, Kernel] | None = None,
    dtype: Any = jnp.float32,
) -> Adapter:
    """Load an adapter from a folder that PEFT's `save_pretrained` wrote.

    Nothing in the folder is run: a pickle is refused unopened, and a pattern from the file that
    could take for ever is not matched. The ranks are those of the tensors.

    Args:
      path: Folder with `adapter_config.json` and `adapter_model.safetensors`.
      variables: The base: parameters, or `{"params": parameters}`; of `jax.ShapeDtypeStruct`s too.
      names: Path of each kernel -> its module's name in torch, "{layer}" and "{expert}" for the
        position in a stack: `model.hf_names` of a model of `jax_lora.models`.
      kernels: What `find_kernels` found, for kernels of more than (in, out) behind the stack.
      dtype: Type of the factors, as PEFT gives them whatever the file's; None keeps the file's.

    Returns:
      The adapter, for `combine`, `merge`, and `save_adapter`.

    Raises:
      AdapterFileError: The files are broken, ask for what is not implemented, or do not fit the
        base. If they fit a changed base (untied, with layers repeated, of another vocabulary), the
        message says so, and `load_model` makes it.
      StructureError: A path of `names` is none of the parameters'.
      AmbiguousKernelError: A kernel's axes only `kernels` could tell.

    Warns:
      AdapterFileWarning: The configuration has fields that are not known here.

    Example:
      >>> import tempfile, jax, jax_lora as jl
      >>> from jax_lora.bundled import model_path
      >>> model, params = jl.models.load(model_path())
      >>> kernels = jl.find_kernels(
      ...     lambda p, ids: model.apply({"params": p}, ids), params, jax.numpy.zeros((1, 4), int))
      >>> config = jl.LoraConfig(rank=4, targets=["q_proj", "v_proj"])
      >>> adapter = jl.lora_init(jax.random.key(0), params, config, kernels=kernels)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jl.peft.save(folder, adapter, names=model.hf_names)
      ...     again = jl.peft.load(folder, params, names=model.hf_names)
      >>> sorted(again.pairs) == sorted(adapter.pairs)
      True
    """
    folder = Path(path)
    tensors, config = read_tensors(folder, WEIGHTS), read_config(folder)
    return assemble(folder, tensors, config, variables, names=names, kernels=kernels, dtype=dtype)


def assemble(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    variables: Any,
    *,
    names: Mapping[str, str],
    kernels: Mapping[str, Kernel] | None = None,
    dtype: Any = jnp.float32,
) -> Adapter:
    """Make an adapter of the contents of its folder.

    Args:
      folder: The folder, for messages.
      tensors: The tensors by name.
      config: The configuration.
      variables: As for `load`, and so are `names`, `kernels` and `dtype`.
      names: Names of modules by path.
      kernels: What `find_kernels` found.
      dtype: Type of the factors.

    Returns:
      The adapter.

    Raises:
      AdapterFileError: They do not fit the base.
    """
    leaves = find_leaves(variables, names, kernels)
    sites = sites_of(leaves)
    grouped, rest = group(tensors, sites)
    base = dict(paths.flatten_with_paths(variables)[0])
    table = tied_table(names)
    ends = settle(grouped, rest, table, config, lambda: base.get(sites[table or ""].leaf.path))
    whole, rows, others = whole_tensors.read(ends.rest, base, sites, config)
    problems = [
        *_replication_problems(config, leaves),
        *(f"{reason}, and {UNTIE}" for reason in ends.one_sided),
        *ends.problems,
        *(problem for module in grouped for problem in _problems(grouped[module], sites[module])),
        *_missing(grouped, config, sites),
        *others,
    ]
    if problems:
        raise _refusal(folder, problems)
    pairs = _pairs(grouped, sites, config, dtype)
    settings = keep(our_config(config, pairs, whole, dtype), config_text(config))
    cast = {name: jnp.asarray(leaf, dtype or leaf.dtype) for name, leaf in whole.items()}
    return Adapter(pairs, cast, settings, rows)


Parts = dict[str, np.ndarray]


def group(
    tensors: Mapping[str, np.ndarray], sites: Mapping[str, Site]
) -> tuple[dict[str, Parts], dict[str, np.ndarray]]:
    """Sort the tensors of factors by the site that they belong to; the others are left over.

    Args:
      tensors: Every tensor of the file by name.
      sites: Every site of the base by name.

    Returns:
      Tensors of factors by site and by what they hold, and the other tensors by name.
    """
    by_place: dict[str, dict[int, Parts]] = {}
    rest = {}
    of_place: dict[str, list[str]] = {}
    for name, site in sites.items():
        of_place.setdefault(keys.owner(site), []).append(name)
    for name, tensor in tensors.items():
        key = keys.parse(name)
        if key is None or key.module not in of_place:
            rest[name] = tensor
        else:
            by_place.setdefault(key.module, {}).setdefault(key.depth, {})[key.part] = tensor
    grouped = {}
    for place, levels in by_place.items():
        chosen = _assigned(levels, of_place[place], sites)
        for depth, parts in levels.items():
            if depth in chosen:
                grouped[chosen[depth]] = parts
            else:
                stem = keys.PREFIX + place + ".base_layer" * depth
                rest |= {stem + part: tensor for part, tensor in parts.items()}
    return grouped, rest


def _assigned(
    levels: Mapping[int, Parts], names: list[str], sites: Mapping[str, Site]
) -> dict[int, str]:
    """Tell which parameter of a module each level of nesting belongs to: its shapes say so."""
    if len(names) == 1:
        return {0: names[0]} if 0 in levels else {}
    chosen, free = {}, list(names)
    for depth, parts in sorted(levels.items(), reverse=True):
        fits = [name for name in free if not list(_problems(parts, sites[name]))]
        if fits:
            chosen[depth] = fits[0]
            free.remove(fits[0])
    return chosen


def _problems(parts: Parts, site: Site) -> Iterator[str]:
    """Say what is wrong with the tensors of one site."""
    a, b = (keys.TABLE_A, keys.TABLE_B) if site.leaf.is_table else (keys.A, keys.B)
    for part in (a, b):
        if part not in parts:
            yield f"missing: {site.module}{part}"
    rank = keys.rank_in(parts, site)
    if rank is None and a in parts:
        yield f"wrong shape: {site.module}{a} is {parts[a].shape}, which gives no rank"
    for part, tensor in parts.items():
        if site.leaf.is_table and part in (keys.A, keys.B):
            yield f"extra: {site.module}{part}, of a table that is looked up"
        elif not site.leaf.is_table and part in (keys.TABLE_A, keys.TABLE_B):
            yield f"extra: {site.module}{part}, of a kernel that is no table"
        elif rank and tensor.shape != (want := keys.shapes_of(site, part, rank)):
            yield f"wrong shape: {site.module}{part} is {tensor.shape}, expected {want}"


def _missing(
    grouped: Mapping[str, Parts], config: Mapping[str, Any], sites: Mapping[str, Site]
) -> Iterator[str]:
    """Modules that the configuration names and the file has no factors of."""
    for module in expected_modules(config, sites):
        if module not in grouped:
            yield f"missing: {module}{keys.A}, although the configuration names it"


def _pairs(
    grouped: Mapping[str, Parts],
    sites: Mapping[str, Site],
    config: Mapping[str, Any],
    dtype: Any,
) -> dict[str, LoraPair]:
    found: dict[str, dict[tuple[int, ...], Factors]] = {}
    leaves: dict[str, Leaf] = {}
    for module, parts in grouped.items():
        site = sites[module]
        factors = keys.decode(parts, site, lambda rank, m=module: scale_of(config, m, rank))
        found.setdefault(site.leaf.path, {})[site.position] = factors
        leaves[site.leaf.path] = site.leaf
    return {path: join(leaves[path], each, dtype) for path, each in sorted(found.items())}


def _replication_problems(config: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> Iterator[str]:
    ranges = config["layer_replication"]
    depths = {leaf.shape[0] for leaf in leaves.values() if leaf.depth}
    if ranges and depths != {sum(stop - start for start, stop in ranges)}:
        yield (
            f"layer_replication {ranges}: the base has {max(depths, default=0)} layers; "
            "jl.peft.load_model(path, model, params) repeats them"
        )


def _refusal(folder: Path, problems: list[str]) -> AdapterFileError:
    return AdapterFileError(
        format_error(
            str(folder),
            got=f"{len(problems)} things that do not fit the base:"
            + "".join(f"\n    {problem}" for problem in problems),
            expected="exactly the tensors that its configuration and the base call for",
            fix="Load it for the base that it was trained on, with that model's names. Where a "
            "line names it: model, params, adapter = jl.peft.load_model(path, model, params).",
        )
    )
