"""find_kernels: find the leaves that a function contracts, and the roles of their axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.adapter import is_weight, plain_leaves
from jax_lora.kernels.kernel import Kernels
from jax_lora.transform.analyze import Analyze, Stream
from jax_lora.transform.parameters import not_parameters
from jax_lora.transform.programs import Body
from jax_lora.transform.record import Bar, Record


def find_kernels(fn: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> Kernels:
    """Find the kernels among the leaves of a function's first argument.

    Pass the result to `lora_init` if a kernel is not a plain (in, out) matrix: stacked layers,
    heads, experts, embeddings, convolutions. The function is traced on shapes and types, so
    `jax.ShapeDtypeStruct`s are sufficient and no array is allocated. The result does not depend on
    additional outputs of the function.

    Args:
      fn: Any function of a tree of parameters, such as `model.apply`.
      tree: Its first argument. Only parameters can be adapted: the collection `params` of Linen
        variables, variables of type `nnx.Param` of NNX state, all leaves of any other tree.
      *args: Its other arguments, of any shape that it accepts.
      **kwargs: Its keyword arguments.

    Returns:
      A mapping from path to `Kernel` for each floating-point parameter that is used in a
      contraction, an embedding lookup or a convolution. Its attribute `skipped` maps the path of
      every other matrix that the function uses to the reason why it cannot be adapted.

    Raises:
      StructureError: The tree already has an adapter.

    Example:
      >>> import jax.numpy as jnp
      >>> def attend(params, x):  # (tokens, d) -> (tokens, heads, head_dim)
      ...     return jnp.einsum("td,dhk->thk", x, params["query"]) ** 2
      >>> params = {"query": jax.ShapeDtypeStruct((16, 4, 8), jnp.float32)}
      >>> kernel = find_kernels(attend, params, jnp.ones((2, 16)))["query"]
      >>> kernel.kind, kernel.in_axes, kernel.out_axes
      ('dense', (0,), (1, 2))
    """
    leaves, treedef = jax.tree.flatten((tree, args, kwargs), is_leaf=is_weight)
    named = [path for path, _ in plain_leaves("find_kernels", tree)]
    data = [index for index, leaf in enumerate(leaves) if _is_data(leaf, index < len(named))]

    def program(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for index, array in zip(data, arrays, strict=True):
            filled[index] = array
        tree, args, kwargs = jax.tree.unflatten(treedef, filled)
        results = jax.tree.leaves(fn(tree, *args, **kwargs))
        return [leaf for leaf in results if isinstance(leaf, jax.Array)]

    closed = jax.make_jaxpr(program)(*[_stand_in(leaves[index]) for index in data])
    record = Record()
    others = not_parameters(tree)
    bars = {path: Bar(why, is_parameter=False) for path, why in others.items()}
    inputs = [
        record.leaf(
            named[index],
            leaves[index].shape,
            leaves[index].dtype,
            bars.get(named[index]) or _not_floating(leaves[index]),
        )
        if index < len(named)
        else Stream(math.prod(leaves[index].shape), external=True)
        for index in data
    ]
    analyze = Analyze(record)
    outputs = analyze.run(Body(closed.jaxpr, closed.consts), inputs)
    results = [analyze.materialized(value, None, "return") for value in outputs]
    return record.results([stream.heads for stream in results])


def _is_data(leaf: Any, is_parameter: bool) -> bool:
    array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or is_weight(leaf)
    return array or (is_parameter and hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def _stand_in(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_weight(leaf) else leaf


def _not_floating(leaf: Any) -> Bar | None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jnp.floating):
        return None
    return Bar(f"its type is {dtype}, and only real floating-point leaves can be adapted", True)
