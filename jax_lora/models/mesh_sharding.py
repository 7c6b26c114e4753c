"""Where the parameters of a model live on a mesh: fully sharded, tensor and expert parallelism.

    data     copies of the model; each has part of the rows of a batch
    fsdp     parts of every matrix and of the rows; a layer's weights are gathered when it runs
    tensor   heads, feed-forward channels and vocabulary
    expert   experts of a mixture

Reference:
    Rajbhandari et al., ZeRO (arXiv:1910.02054), section 5, for fsdp; Shoeybi et al., Megatron-LM
    (arXiv:1909.08053), section 3, for tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_lora.adapter import is_weight
from jax_lora.errors import ConfigError
from jax_lora.paths import flatten_with_paths
from jax_lora.quantize import QuantizedWeight, gathered_as

DATA, FSDP, TENSOR, EXPERT = AXES = ("data", "fsdp", "tensor", "expert")
ROW_AXES = (DATA, FSDP)  # they share the rows of a batch

# Matrices whose outputs, or whose inputs, are split over `tensor`; between the two, no device
# needs the channels of another.
_COLUMN_PARALLEL = frozenset(
    "q_proj k_proj v_proj qkv_proj gate_proj up_proj gate_up_proj c_attn c_fc query key value "
    "intermediate q k v wi wi_0 wi_1 lm_head".split()
)
_ROW_PARALLEL = frozenset("o_proj down_proj c_proj output o wo".split())
_TOKEN_TABLES = frozenset("embed_tokens wte word_embeddings shared".split())
# A few values for each head, which every device reads.
_SMALL_TABLES = frozenset(["relative_attention_bias"])
_LEAVES = frozenset(["kernel", "bias", "embedding", "scale"])

Place = Callable[[str, tuple[int, ...]], NamedSharding]


def mesh_sharding(mesh: Mesh | AbstractMesh, *, without: Sequence[str] = ()) -> Place:
    """Choose the sharding of every parameter of the models of this package.

    Use it as `load(path, sharding=mesh_sharding(mesh))`. The axes of the mesh are named `data`,
    `fsdp`, `tensor` and `expert`; each may be absent. `fsdp` shards the input axis of a matrix, or
    its output axis if `tensor` shards the input axis or `fsdp` does not divide it. `tensor` shards
    the outputs of the first matrices of a block, the inputs of its last one, and the vocabulary.
    `expert` shards the experts. Axes of layers, vectors, and axes that the mesh does not divide
    are not sharded.

    Args:
      mesh: The mesh, with axes of type `Auto`.
      without: Axes of the mesh over which nothing is sharded.

    Returns:
      A function from a parameter's path and shape to its sharding. A path may start with "params/".

    Raises:
      ConfigError: If the mesh has none of these axes.

    Example:
      >>> from jax.sharding import AbstractMesh
      >>> place = mesh_sharding(AbstractMesh((4, 2), ("fsdp", "tensor")))
      >>> tuple(place("layers/attn/q_proj/kernel", (32, 4096, 4096)).spec)
      (None, 'fsdp', 'tensor')
    """
    if not set(mesh.axis_names) & set(AXES):
        expected, fix = f"some of {', '.join(AXES)}", "name the axes of the mesh so."
        raise ConfigError(
            "mesh_sharding: the axes", got=repr(mesh.axis_names), expected=expected, fix=fix
        )
    sizes = {name: n for name, n in mesh.shape.items() if n > 1 and name not in without}
    return lambda path, shape: NamedSharding(mesh, _spec(path, shape, sizes))


def gather_codes(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Let a step gather the codes of quantized weights over `fsdp`, and not the weights.

    The parameters keep their arrays, and get another rule to compute quantized weights.
    """
    if mesh.size == 1:
        return params
    place = mesh_sharding(mesh, without=(FSDP,))
    named, treedef = flatten_with_paths(params, is_leaf=is_weight)
    leaves = [
        gathered_as(leaf, place(path, leaf.shape)) if isinstance(leaf, QuantizedWeight) else leaf
        for path, leaf in named
    ]
    return jax.tree.unflatten(treedef, leaves)


def sharding_like(params: Any) -> Place | None:
    """Return the places of parameters on a mesh, to load others of the same model to them."""
    places = {path: leaf.sharding for path, leaf in flatten_with_paths(params)[0]}
    if not all(isinstance(each, NamedSharding) for each in places.values()):
        return None
    return lambda path, shape: places[path]


def row_spec(
    mesh: Mesh | AbstractMesh, rows: int | None = None, over: Sequence[str] = ROW_AXES
) -> PartitionSpec:
    """Return how the first axis of a batch, or of activations, is sharded over axes of a mesh.

    Fewer of them are used if they do not divide the number of rows; None: they do.
    """
    names, left = [], rows
    for name in over:
        size = mesh.shape.get(name, 1)
        if size > 1 and (left is None or left % size == 0):
            names.append(name)
            left = None if left is None else left // size
    if len(names) < 2:
        return PartitionSpec(*names)
    return PartitionSpec(tuple(names))


def _spec(path: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    *parents, leaf = path.split("/")
    name = parents[-1] if parents and leaf in _LEAVES else leaf
    stack = ("layers" in parents) + ("experts" in parents)
    entries: list[str | None] = [None] * len(shape)

    def shard(over: str, *axes: int) -> None:
        """Shard the first of these axes that is free and that the mesh divides."""
        for axis in axes:
            if over in sizes and entries[axis] is None and shape[axis] % sizes[over] == 0:
                entries[axis] = over
                return

    inputs, outputs = len(shape) - 2, len(shape) - 1
    if "experts" in parents:
        shard(EXPERT, stack - 1)
    if name in _COLUMN_PARALLEL:
        shard(TENSOR, outputs)
    if len(shape) - stack == 2 and name not in _SMALL_TABLES:
        if name in _ROW_PARALLEL or name in _TOKEN_TABLES:
            shard(TENSOR, inputs)
        shard(FSDP, inputs, outputs)
    return PartitionSpec(*entries)
