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
from jax_lora.transform.record import Exclusion, Leaf, Record
from jax_lora.transform.tracing import ArrayFunction


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
    named = [path for path, _ in plain_leaves("find_kernels", tree)]
    is_array = lambda index, leaf: _is_array(leaf, is_parameter=index < len(named))  # noqa: E731
    function = ArrayFunction(fn, (tree, *args), kwargs, is_array, is_weight)
    record = Record()
    others = not_parameters(tree).items()
    excluded = {path: Exclusion(why, is_parameter=False) for path, why in others}
    inputs: list[Leaf | Stream] = []
    for index, leaf in function.inputs.items():
        if index < len(named):
            path = named[index]
            exclusion = excluded.get(path) or _not_floating(leaf)
            inputs.append(record.leaf(path, leaf.shape, leaf.dtype, exclusion))
        else:
            inputs.append(Stream(math.prod(leaf.shape), external=True))
    analyze = Analyze(record)
    outputs = analyze.run(function.trace(), inputs)
    results = [analyze.materialized(value, None, "return") for value in outputs]
    return record.results([stream.heads for stream in results])


def _is_array(leaf: Any, *, is_parameter: bool) -> bool:
    array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or is_weight(leaf)
    return array or (is_parameter and hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def _not_floating(leaf: Any) -> Exclusion | None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jnp.floating):
        return None
    return Exclusion(
        f"its type is {dtype}, and only real floating-point leaves can be adapted", True
    )
