"""Load a PEFT adapter.

    adapter_config.json        -> scale of each module
    adapter_model.safetensors  -> factors by module -> pairs by path

An unknown tensor, or a missing tensor of a module that the configuration names, is an error. One
message lists all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_lora import paths
from jax_lora.adapter import Adapter
from jax_lora.errors import AdapterFileError
from jax_lora.hub.snapshots import local_folder
from jax_lora.kernels.kernel import Kernel
from jax_lora.peft import keys, whole_tensors
from jax_lora.peft.adapter_config import config_text, keep, read_config
from jax_lora.peft.expert_modules import half_magnitudes, modules_in_file
from jax_lora.peft.factors import join_modules
from jax_lora.peft.hf_modules import Leaf, Site, find_leaves, sites_of
from jax_lora.peft.our_config import our_config
from jax_lora.peft.scaling import scale_of
from jax_lora.peft.target_modules import expected_modules
from jax_lora.peft.tensor_file import read_tensors, restore_files
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
    """Load an adapter from a folder of PEFT's `save_pretrained`.

    No code from the folder is executed: pickle files are not opened, and regular expressions with
    a potentially unbounded run time are refused. The ranks are those of the tensors.

    Args:
      path: Folder with `adapter_config.json` and `adapter_model.safetensors`, or a name on the
        Hugging Face Hub as a string, `"owner/name"` or `"owner/name@revision"`.
      variables: The base parameters, or `{"params": parameters}`; arrays or
        `jax.ShapeDtypeStruct`s.
      names: Path of each kernel -> name of its PyTorch module, with "{layer}" and "{expert}" for
        the position in a stack: `model.hf_names` for a model of `jax_lora.models`.
      kernels: The result of `find_kernels`, for other axes than the stack and (in, out).
      dtype: Type of the factors; None for the type of the file. Like PEFT, the default is float32.

    Returns:
      The adapter, for `combine`, `merge` and `save_adapter`.

    Raises:
      AdapterFileError: The files are damaged, need an unimplemented feature, or do not fit the base
        model. If they fit a changed base model (untied, with repeated layers, or with another
        vocabulary), the message recommends `load_model`.
      StructureError: A path of `names` is not in the parameters.
      AmbiguousKernelError: The axes of a kernel are not known without `kernels`.
      HubError: The name cannot be found or downloaded.

    Warns:
      AdapterFileWarning: The configuration has unknown fields.

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
    return assemble(read_files(path), variables, names=names, kernels=kernels, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class PeftFiles:
    """The contents of the files of an adapter."""

    folder: Path  # for messages only
    tensors: dict[str, np.ndarray]
    config: dict[str, Any]


def read_files(path: str | os.PathLike[str]) -> PeftFiles:
    """Read the files of an adapter from a folder or from the Hugging Face Hub."""
    folder = local_folder(path, error=AdapterFileError)
    restore_files(folder, WEIGHTS)
    return PeftFiles(folder, read_tensors(folder, WEIGHTS), read_config(folder))


def assemble(
    files: PeftFiles,
    variables: Any,
    *,
    names: Mapping[str, str],
    kernels: Mapping[str, Kernel] | None = None,
    dtype: Any,
) -> Adapter:
    """Build an adapter from the contents of its files, which must fit the base model."""
    tensors, config = files.tensors, files.config
    leaves = find_leaves(variables, names, kernels)
    sites = sites_of(modules_in_file(leaves, tensors))
    grouped, rest = group(tensors, sites)
    base = dict(paths.flatten_with_paths(variables)[0])
    table = tied_table(names)
    tied = None if table is None else base.get(sites[table].leaf.path)
    ends = settle(grouped, rest, table, config, tied)
    whole, rows, others = whole_tensors.read(ends.rest, base, sites, config)
    problems = [
        *_replication_problems(config, leaves),
        *(f"{reason}, and {UNTIE}" for reason in ends.one_sided),
        *ends.problems,
        *(problem for module in grouped for problem in _problems(grouped[module], sites[module])),
        *half_magnitudes(grouped, sites),
        *(
            f"missing: {module}{keys.A}, which the configuration names"
            for module in expected_modules(config, sites)
            if module not in grouped
        ),
        *others,
    ]
    if problems:
        raise AdapterFileError(
            f"{files.folder}: {len(problems)} problems",
            got=problems,
            expected="exactly the tensors that the configuration and the base model require",
            fix="Load the base model that the adapter was trained on, and pass its names. If a "
            "line says so: model, params, adapter = jl.peft.load_model(path, model, params).",
        )
    found = {
        module: keys.decode(parts, sites[module], functools.partial(scale_of, config, module))
        for module, parts in grouped.items()
    }
    pairs = join_modules(found, sites, leaves, dtype)
    settings = keep(our_config(config, pairs, whole, dtype), config_text(config))
    cast = {name: jnp.asarray(leaf, dtype or leaf.dtype) for name, leaf in whole.items()}
    return Adapter(pairs, cast, settings, rows)


Parts = dict[str, np.ndarray]


def group(
    tensors: Mapping[str, np.ndarray], sites: Mapping[str, Site]
) -> tuple[dict[str, Parts], dict[str, np.ndarray]]:
    """Group the factor tensors by site and suffix, and return the other tensors by name."""
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
    """Assign each nesting level of a module to one of its parameters, by the shapes."""
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
    """Yield the problems of the tensors of one site."""
    a, b = (keys.TABLE_A, keys.TABLE_B) if site.leaf.is_table else (keys.A, keys.B)
    for part in (a, b):
        if part not in parts:
            yield f"missing: {site.module}{part}"
    rank = keys.rank_in(parts, site)
    if rank is None and a in parts:
        yield f"wrong shape: {site.module}{a} is {parts[a].shape}, which has no valid rank"
    for part, tensor in parts.items():
        if site.leaf.is_table and part in (keys.A, keys.B):
            yield f"extra: {site.module}{part}, but the module is an embedding table"
        elif not site.leaf.is_table and part in (keys.TABLE_A, keys.TABLE_B):
            yield f"extra: {site.module}{part}, but the module is not an embedding table"
        elif rank and tensor.shape != (want := keys.shapes_of(site, part, rank)):
            yield f"wrong shape: {site.module}{part} is {tensor.shape}, expected {want}"


def _replication_problems(config: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> Iterator[str]:
    ranges = config["layer_replication"]
    depths = {leaf.shape[0] for leaf in leaves.values() if leaf.depth}
    if ranges and depths != {sum(stop - start for start, stop in ranges)}:
        yield (
            f"layer_replication {ranges}: the base has {max(depths, default=0)} layers; "
            "jl.peft.load_model(path, model, params) repeats them"
        )
