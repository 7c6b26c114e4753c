"""The names and layouts of the factor tensors of PEFT.

    base_model.model.<module>.lora_A.weight        (r, in)          a.T
    base_model.model.<module>.lora_B.weight        (out, r)         b.T
    base_model.model.<module>.lora_B.bias          (out,)
    base_model.model.<module>.lora_embedding_A     (r, vocabulary)  a.T
    base_model.model.<module>.lora_embedding_B     (out, r)         b.T
    base_model.model.<module>.lora_magnitude_vector  (out,)

Experts share a module: A is (experts * r, in), concatenated by expert, and B is (out, r * experts),
with the expert as the fastest axis. If several parameters of a module are adapted, their wrappers
are nested: the first parameter has the most `.base_layer` segments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jax_lora.peft.factors import Factors
from jax_lora.peft.hf_modules import Site

PREFIX = "base_model.model."
A, B, B_BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
TABLE_A, TABLE_B = ".lora_embedding_A", ".lora_embedding_B"
MAGNITUDE = ".lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"
ROWS_FROZEN = ".token_adapter.base_layer.weight"
FROZEN = ".base_layer.weight"
# PEFT writes some tensors of a module up to three times.
_COPIES = (".original_module.", ".modules_to_save.")
_PARTS = re.compile(
    r"(?P<module>.*?)(?P<nested>(\.base_layer)*)"
    rf"(?P<part>{'|'.join(map(re.escape, (A, B, B_BIAS, TABLE_A, TABLE_B, MAGNITUDE)))})"
)


class Key(NamedTuple):
    """The parsed name of a factor tensor."""

    module: str  # without prefix and nesting
    depth: int  # number of `.base_layer` segments
    part: str  # the suffix that identifies the tensor, such as `A`


def is_copy(name: str) -> bool:
    """Tell whether a tensor is a copy of another one in the file.

    Example:
      >>> is_copy("base_model.model.lm_head.original_module.weight")
      True
    """
    return any(copy in name for copy in _COPIES)


def parse(name: str) -> Key | None:
    """Parse the name of a tensor; None if it is not a factor tensor.

    Example:
      >>> parse("base_model.model.h.0.attn.lora_A.weight")
      Key(module='h.0.attn', depth=0, part='.lora_A.weight')
    """
    match = _PARTS.fullmatch(name.removeprefix(PREFIX))
    if match is None or not name.startswith(PREFIX):
        return None
    return Key(match["module"], match["nested"].count(".base_layer"), match["part"])


def owner(site: Site) -> str:
    """Return the module that has the tensors of a site.

    For the parameter `mlp.experts.down_proj` it is `mlp.experts`.
    """
    return site.module.rpartition(".")[0] if site.leaf.is_parameter else site.module


# -----------------------------------------------------------------------------------------------
# Writing
# -----------------------------------------------------------------------------------------------


def encode(found: Mapping[str, Factors], sites: Mapping[str, Site]) -> dict[str, np.ndarray]:
    """Convert factors by module or parameter to PEFT tensors by name, of the same types."""
    sharing: dict[str, list[str]] = {}
    for module in found:
        sharing.setdefault(owner(sites[module]), []).append(module)
    tensors = {}
    for place, modules in sharing.items():
        for depth, module in zip(reversed(range(len(modules))), modules, strict=True):
            stem = PREFIX + place + ".base_layer" * depth
            tensors |= _encode_one(stem, found[module], sites[module])
    return tensors


def _encode_one(stem: str, factors: Factors, site: Site) -> dict[str, np.ndarray]:
    if factors.a.ndim == 3:  # (experts, in, r), (experts, r, out)
        a = factors.a.swapaxes(1, 2).reshape(-1, factors.a.shape[1])  # (experts * r, in)
        b = factors.b.transpose(2, 1, 0).reshape(factors.b.shape[2], -1)  # (out, r * experts)
    else:
        a, b = factors.a.T, factors.b.T
    names = (TABLE_A, TABLE_B) if site.leaf.is_table else (A, B)
    tensors = {stem + names[0]: a, stem + names[1]: b}
    if factors.bias is not None:
        tensors[stem + B_BIAS] = factors.bias
    if factors.magnitude is not None:
        tensors[stem + MAGNITUDE] = factors.magnitude
    return tensors


# -----------------------------------------------------------------------------------------------
# Reading
# -----------------------------------------------------------------------------------------------


def shapes_of(site: Site, part: str, rank: int) -> tuple[int, ...]:
    """Return the expected shape of the tensor with a suffix, for a rank."""
    kernel, columns = site.leaf.kernel, _experts(site) * rank
    if part in (A, TABLE_A):
        return (columns, kernel.in_size)
    if part in (B, TABLE_B):
        return (kernel.out_size, columns)
    return (kernel.out_size,)


def _experts(site: Site) -> int:
    """Count the experts that share the module of a site; 1 for other modules."""
    return math.prod(site.leaf.kernel.stack_shape[site.leaf.depth :])


def decode(
    parts: Mapping[str, np.ndarray], site: Site, scale_of_rank: Callable[[int], float]
) -> Factors:
    """Convert the PEFT tensors of one site, by suffix and with valid shapes, to factors."""
    a = parts[TABLE_A if TABLE_A in parts else A]
    b = parts[TABLE_B if TABLE_B in parts else B]
    if site.leaf.kernel.stack_shape[site.leaf.depth :]:
        experts = _experts(site)
        rank = a.shape[0] // experts
        a = a.reshape(experts, rank, -1).swapaxes(1, 2)  # (experts, in, r)
        b = b.reshape(-1, rank, experts).transpose(2, 1, 0)  # (experts, r, out)
    else:
        a, b = a.T, b.T
    rank = a.shape[-1]
    return Factors(a, b, scale_of_rank(rank), parts.get(MAGNITUDE), parts.get(B_BIAS))


def rank_in(parts: Mapping[str, np.ndarray], site: Site) -> int | None:
    """Return the rank according to the shape of A, or None if the shape is invalid."""
    a = parts.get(A, parts.get(TABLE_A))
    experts = _experts(site)
    if a is None or a.ndim != 2 or a.shape[0] % experts or not a.shape[0]:
        return None
    return a.shape[0] // experts
