"""Adapters of transformers 4, in which every expert of a mixture has its own modules.

transformers 4                         transformers 5 and this library
mlp.experts.3.gate_proj and up_proj    mlp.experts.gate_up_proj  (layers, experts, in, 2 * width)
mlp.experts.3.down_proj                mlp.experts.down_proj     (layers, experts, width, out)

Mixtral has the block `block_sparse_moe` instead of `mlp`, and w1, w3, w2 for gate, up, down. The
columns of `gate_up_proj` are those of the gate, followed by those of up.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from jax_lora.peft import keys
from jax_lora.peft.hf_modules import Leaf, Site, describe

# Block -> gate, up and down of an expert.
_BLOCKS = {
    "block_sparse_moe": ("w1", "w3", "w2"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
# A router has the same name in both versions, except in Mixtral.
_SEPARATE = re.compile(r"\.(block_sparse_moe)\.gate\.|\.(block_sparse_moe|mlp)\.experts\.\d+\.")


def modules_in_file(leaves: Mapping[str, Leaf], tensors: Iterable[str]) -> dict[str, Leaf]:
    """Return the leaves by module template, with the modules that the tensors of a file have.

    If the file has separate experts, their stack is one leaf per module of an expert.
    """
    matches = (_SEPARATE.search(name) for name in tensors)
    block = next((match[1] or match[2] for match in matches if match), None)
    parts = (part for leaf in leaves.values() for part in _separate(leaf, block))
    return {part.template: part for part in parts}


def _separate(leaf: Leaf, block: str | None) -> Iterator[Leaf]:
    """Yield the modules of a leaf in transformers 4; block None: a file of transformers 5."""
    layer, _, name = leaf.template.rpartition(".mlp.")
    if block is not None and name == "gate.weight":
        yield describe(leaf.path, f"{layer}.{block}.gate", leaf.shape, leaf.kernel)
    elif block is not None and name in ("experts.gate_up_proj", "experts.down_proj"):
        gate, up, down = _BLOCKS[block]
        modules = (down,) if name == "experts.down_proj" else (gate, up)
        width = leaf.kernel.out_size // len(modules)
        shape = (*leaf.kernel.stack_shape, leaf.kernel.in_size, width)
        for place, module in enumerate(modules):
            template = f"{layer}.{block}.experts.{{expert}}.{module}"
            columns = (place * width, (place + 1) * width)
            yield dataclasses.replace(describe(leaf.path, template, shape), columns=columns)
    else:
        yield leaf


def half_magnitudes(
    grouped: Mapping[str, Mapping[str, object]], sites: Mapping[str, Site]
) -> Iterator[str]:
    """Yield the experts with a DoRA magnitude for only some columns of a kernel."""
    found: dict[tuple[str, tuple[int, ...]], set[str]] = {}
    for module, parts in grouped.items():
        if sites[module].leaf.columns and keys.MAGNITUDE in parts:
            found.setdefault((sites[module].leaf.path, sites[module].position), set()).add(module)
    for module, site in sites.items():
        have = found.get((site.leaf.path, site.position))
        if site.leaf.columns and have and module not in have:
            yield (
                f"missing: {module}{keys.MAGNITUDE}; {min(have)} has one, and both are one kernel "
                "here. Merge the adapter in PEFT, and load the merged model"
            )
