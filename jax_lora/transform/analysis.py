"""find_kernels: which leaves a function contracts, and along which of their axes.

The function is traced to a jaxpr, and the jaxpr is walked once with a label on every axis of every
leaf. No number is computed: all shapes stand in the jaxpr already. Structural operations carry the
labels along; contractions, lookups and convolutions write down which labels they meet.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core

from jax_lora import labels as labelling
from jax_lora import paths
from jax_lora.kernel import Kernel
from jax_lora.labels import Label
from jax_lora.transform.control_flow import scan_layout
from jax_lora.transform.interpreter import opened


def find_kernels(fn: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> dict[str, Kernel]:
    """Report how a function uses the leaves of its first argument.

    Use it for `lora_init` wherever a kernel is more than a plain (in, out) matrix: stacked layers,
    heads, experts, embeddings, convolutions. Works on `jax.ShapeDtypeStruct`s; allocates nothing.

    Args:
      fn: Any function of a tree of parameters, such as `model.apply`.
      tree: Its first argument.
      *args: Its other arguments, of any shape that it accepts.
      **kwargs: Its keyword arguments.

    Returns:
      A `Kernel` by path for each floating leaf that a contraction, an embedding lookup or a
      convolution consumes.

    Example:
      >>> import jax.numpy as jnp
      >>> def attend(params, x):  # (tokens, d) -> (tokens, heads, head_dim)
      ...     return jnp.einsum("td,dhk->thk", x, params["query"]) ** 2
      >>> params = {"query": jax.ShapeDtypeStruct((16, 4, 8), jnp.float32)}
      >>> kernel = find_kernels(attend, params, jnp.ones((2, 16)))["query"]
      >>> kernel.kind, kernel.in_axes, kernel.out_axes
      ('dense', (0,), (1, 2))
    """
    leaves, treedef = jax.tree.flatten((tree, args, kwargs))
    named = paths.flatten_with_paths(tree)[0]
    data = [index for index, leaf in enumerate(leaves) if _is_data(leaf, index < len(named))]

    def program(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for index, array in zip(data, arrays, strict=True):
            filled[index] = array
        tree, args, kwargs = jax.tree.unflatten(treedef, filled)
        results = jax.tree.leaves(fn(tree, *args, **kwargs))
        return [leaf for leaf in results if isinstance(leaf, jax.Array)]

    closed = jax.make_jaxpr(program)(*[leaves[index] for index in data])
    recorder = _Recorder()
    inputs = [
        recorder.leaf(named[index][0], leaves[index])
        if index < len(named) and jax.numpy.issubdtype(leaves[index].dtype, jax.numpy.floating)
        else None
        for index in data
    ]
    outputs = _walk(recorder, closed.jaxpr, inputs, trips=1)
    return recorder.kernels(outputs)


def _is_data(leaf: Any, is_parameter: bool) -> bool:
    array = isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
    return array or (is_parameter and hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


# -----------------------------------------------------------------------------------------------
# What is known of a variable
# -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A variable that is a leaf of the parameters, moved, cut or scaled; a label per axis."""

    path: str
    labels: tuple[Label | None, ...]

    @property
    def is_vector(self) -> bool:
        """Whether it is no more than a bias or a scale."""
        return sum(label is not None for label in self.labels) < 2

    def with_labels(self, labels: Sequence[Label | None]) -> _Leaf:
        return dataclasses.replace(self, labels=tuple(labels))


@dataclasses.dataclass(frozen=True)
class _Product:
    """A variable that is a kernel's product, with at most a bias, a cast or a soft cap since."""

    paths: frozenset[str]


_Known = _Leaf | _Product | None


@dataclasses.dataclass
class _Uses:
    """What the operations that consumed one leaf did with its axes."""

    shape: tuple[int, ...]
    dtype: Any
    kinds: list[str] = dataclasses.field(default_factory=list)
    summed: list[frozenset[int]] = dataclasses.field(default_factory=list)
    stacked: set[int] = dataclasses.field(default_factory=set)
    flops: int = 0


class _Recorder:
    """Collects the uses of every leaf."""

    def __init__(self) -> None:
        self._uses: dict[str, _Uses] = {}

    def leaf(self, path: str, leaf: Any) -> _Leaf:
        self._uses[path] = _Uses(tuple(leaf.shape), leaf.dtype)
        return _Leaf(path, tuple(range(len(leaf.shape))))

    def stack(self, path: str, *labels: Label | None) -> None:
        """Write down that axes hold several kernels."""
        for label in labels:
            self._uses[path].stacked |= labelling.origins(label)

    def use(self, path: str, kind: str, summed: Sequence[Label | None], flops: int) -> None:
        """Write down one use, with the labels that it sums over or looks up by."""
        uses = self._uses[path]
        uses.kinds.append(kind)
        uses.summed.append(frozenset().union(*map(labelling.origins, summed)))
        uses.flops += flops

    def kernels(self, outputs: Sequence[_Known]) -> dict[str, Kernel]:
        heads = frozenset().union(*(out.paths for out in outputs if isinstance(out, _Product)))
        found = {path: _kernel(path, uses, path in heads) for path, uses in self._uses.items()}
        return {path: kernel for path, kernel in found.items() if kernel is not None}


def _kernel(path: str, uses: _Uses, is_output_head: bool) -> Kernel | None:
    if not uses.kinds:
        return None
    # A table that is looked up is an embedding, also where a tied head contracts it as well.
    kind = "embedding" if "embedding" in uses.kinds else uses.kinds[0]
    summed = uses.summed[uses.kinds.index(kind)]
    in_axes = tuple(axis for axis in range(len(uses.shape)) if axis in summed)
    stack_axes = tuple(sorted(uses.stacked - summed))
    out_axes = tuple(
        axis for axis in range(len(uses.shape)) if axis not in summed and axis not in stack_axes
    )
    if not in_axes or not out_axes:
        return None  # a vector: there is no matrix to be of low rank
    return Kernel(
        path, uses.shape, uses.dtype, kind, in_axes, out_axes, stack_axes,
        len(uses.kinds), uses.flops, is_output_head and kind == "dense",
    )  # fmt: skip


# -----------------------------------------------------------------------------------------------
# The walk
# -----------------------------------------------------------------------------------------------


def _walk(recorder: _Recorder, jaxpr: Any, inputs: Sequence[_Known], trips: int) -> list[_Known]:
    known: dict[Any, _Known] = dict(zip(jaxpr.invars, inputs, strict=True))
    makers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def read(var: Any) -> _Known:
        return None if isinstance(var, jex_core.Literal) else known.get(var)

    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        if any(value is not None for value in values):
            visit = _Visit(recorder, eqn, values, trips, makers)
            known.update(zip(eqn.outvars, visit.outputs(), strict=True))
    return [read(var) for var in jaxpr.outvars]


@dataclasses.dataclass(frozen=True)
class _Visit:
    """One equation of which at least one input is known."""

    recorder: _Recorder
    eqn: Any
    values: Sequence[_Known]
    trips: int
    makers: dict[Any, Any]

    def outputs(self) -> Sequence[_Known]:
        """Return what is known of the outputs."""
        handler = _HANDLERS.get(self.eqn.primitive.name)
        outputs = handler(self) if handler is not None else self._elementwise()
        return outputs if outputs is not None else [None] * len(self.eqn.outvars)

    def leaf(self, position: int = 0) -> _Leaf | None:
        """Return the input at a position if it is a leaf."""
        value = self.values[position]
        return value if isinstance(value, _Leaf) else None

    def shape(self, position: int = 0) -> tuple[int, ...]:
        """Return the shape of the input at a position."""
        return self.eqn.invars[position].aval.shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.eqn.outvars[0].aval.shape

    def _elementwise(self) -> Sequence[_Known] | None:
        """Carry a leaf, or a product, through an operation that keeps its shape."""
        if len(self.eqn.outvars) != 1 or self.eqn.primitive.name not in _ELEMENTWISE:
            return None
        leaves = [
            each
            for i, each in enumerate(self.values)
            if isinstance(each, _Leaf) and self.shape(i) == self.out_shape
        ]
        products = [each for each in self.values if isinstance(each, _Product)]
        # Of one row, a product has the shape of its bias; the sum is the product's.
        if leaves and not (products and all(each.is_vector for each in leaves)):
            return leaves[:1]
        if products and self.eqn.primitive.name in _HEAD_PRESERVING and self._others_are_small():
            return [_Product(frozenset().union(*(each.paths for each in products)))]
        return None

    def _others_are_small(self) -> bool:
        """Tell whether the other inputs are biases, masks or numbers, not another stream."""
        size = math.prod(self.out_shape)
        for var, value in zip(self.eqn.invars, self.values, strict=True):
            # A parameter is no stream, however small the product.
            if isinstance(value, _Product | _Leaf) or isinstance(var, jex_core.Literal):
                continue
            while (
                not isinstance(var, jex_core.Literal)
                and (maker := self.makers.get(var)) is not None
                and maker.primitive.name in ("broadcast_in_dim", "convert_element_type", "reshape")
            ):
                var = maker.invars[0]
            if not isinstance(var, jex_core.Literal) and math.prod(var.aval.shape) >= size > 1:
                return False
        return True


_HEAD_PRESERVING = frozenset(
    "add sub mul div tanh neg convert_element_type copy stop_gradient name select_n "
    "sharding_constraint optimization_barrier".split()
)
_ELEMENTWISE = _HEAD_PRESERVING | frozenset(
    "abs sign exp log logistic max min sqrt rsqrt square integer_pow pow clamp round floor ceil "
    "reduce_precision copy_p device_put rev pvary pcast".split()
)


# -----------------------------------------------------------------------------------------------
# Operations that move axes
# -----------------------------------------------------------------------------------------------


def _moved(labels_of: Callable[[_Visit, _Leaf], Sequence[Label | None]]) -> Any:
    """Handle an operation that keeps a product a product and gives a leaf other labels."""

    def handler(visit: _Visit) -> Sequence[_Known]:
        leaf = visit.leaf()
        value = visit.values[0]
        if leaf is not None:
            value = leaf.with_labels(labels_of(visit, leaf))
        return [value] * len(visit.eqn.outvars)

    return handler


def _transpose(visit: _Visit, leaf: _Leaf) -> list[Label | None]:
    return [leaf.labels[axis] for axis in visit.eqn.params["permutation"]]


def _squeeze(visit: _Visit, leaf: _Leaf) -> list[Label | None]:
    gone = {axis % len(leaf.labels) for axis in visit.eqn.params["dimensions"]}
    return [label for axis, label in enumerate(leaf.labels) if axis not in gone]


def _broadcast(visit: _Visit, leaf: _Leaf) -> list[Label | None]:
    labels: list[Label | None] = [None] * len(visit.out_shape)
    axes = visit.eqn.params["broadcast_dimensions"]
    for axis, label in zip(axes, leaf.labels, strict=True):
        labels[axis] = label
    return labels


def _reshape(visit: _Visit, leaf: _Leaf) -> list[Label | None]:
    old = [axis for axis, size in enumerate(visit.shape()) if size != 1]
    new = [axis for axis, size in enumerate(visit.out_shape) if size != 1]
    labels: list[Label | None] = [None] * len(visit.out_shape)
    groups = labelling.reshape_groups(
        [visit.shape()[axis] for axis in old], [visit.out_shape[axis] for axis in new]
    )
    for olds, news in groups or ():
        names = [leaf.labels[old[axis]] for axis in olds]
        sizes = [visit.out_shape[new[axis]] for axis in news]
        for axis, label in zip(news, labelling.relabel(names, sizes), strict=True):
            labels[new[axis]] = label
    return labels


def _slice(visit: _Visit, leaf: _Leaf) -> Sequence[Label | None]:
    """Cut: an axis cut down to one position holds several kernels, of which this is one."""
    for axis, label in enumerate(leaf.labels):
        if visit.out_shape[axis] == 1 < visit.shape()[axis]:
            visit.recorder.stack(leaf.path, label)
    return leaf.labels


# -----------------------------------------------------------------------------------------------
# Operations that consume
# -----------------------------------------------------------------------------------------------


def _dot_general(visit: _Visit) -> Sequence[_Known]:
    contract, batch = visit.eqn.params["dimension_numbers"]
    summed_size = math.prod(visit.shape()[axis] for axis in contract[0])
    flops = 2 * visit.trips * math.prod(visit.out_shape) * summed_size
    products = set()
    for side in (0, 1):
        if (leaf := visit.leaf(side)) is None or not contract[side]:
            continue
        visit.recorder.stack(leaf.path, *(leaf.labels[axis] for axis in batch[side]))
        summed = [leaf.labels[axis] for axis in contract[side]]
        visit.recorder.use(leaf.path, "dense", summed, flops)
        products.add(leaf.path)
    return [_Product(frozenset(products)) if products else None]


def _gather(visit: _Visit) -> Sequence[_Known] | None:
    leaf = visit.leaf()
    if leaf is None:
        return None
    numbers = visit.eqn.params["dimension_numbers"]
    looked_up = [leaf.labels[axis] for axis in numbers.start_index_map]
    rest = [
        label for axis, label in enumerate(leaf.labels) if axis not in numbers.collapsed_slice_dims
    ]
    if len(rest) < 2:  # rows of a table; anything larger is a choice among kernels
        visit.recorder.use(leaf.path, "embedding", looked_up, 0)
        return None
    visit.recorder.stack(leaf.path, *looked_up)
    remaining = iter(rest)
    ids = len(visit.out_shape) - len(numbers.offset_dims)
    chosen = looked_up[0] if len(looked_up) == 1 and ids else None
    labels = [
        next(remaining) if dim in numbers.offset_dims else chosen
        for dim in range(len(visit.out_shape))
    ]
    return [leaf.with_labels(labels)]


def _ragged_dot(visit: _Visit) -> Sequence[_Known] | None:
    leaf = visit.leaf(1)
    numbers = visit.eqn.params.get("ragged_dot_dimension_numbers")
    if leaf is None or numbers is None:
        return None
    contract = numbers.dot_dimension_numbers[0][1]
    visit.recorder.stack(leaf.path, *(leaf.labels[a] for a in numbers.rhs_group_dimensions))
    summed_size = math.prod(visit.shape(1)[axis] for axis in contract)
    flops = 2 * visit.trips * math.prod(visit.out_shape) * summed_size
    visit.recorder.use(leaf.path, "dense", [leaf.labels[axis] for axis in contract], flops)
    return [_Product(frozenset({leaf.path}))]


def _convolution(visit: _Visit) -> Sequence[_Known] | None:
    leaf = visit.leaf(1)
    if leaf is None:
        return None
    _, *summed = visit.eqn.params["dimension_numbers"].rhs_spec
    window = math.prod(visit.shape(1)[axis] for axis in summed)
    flops = 2 * visit.trips * math.prod(visit.out_shape) * window
    visit.recorder.use(leaf.path, "conv", [leaf.labels[axis] for axis in summed], flops)
    return [_Product(frozenset({leaf.path}))]


# -----------------------------------------------------------------------------------------------
# Operations that hold a program
# -----------------------------------------------------------------------------------------------


def _call(visit: _Visit) -> Sequence[_Known] | None:
    for name in ("jaxpr", "call_jaxpr"):
        if name in visit.eqn.params:
            jaxpr, _ = opened(visit.eqn.params[name])
            return _walk(visit.recorder, jaxpr, visit.values, visit.trips)
    return None


def _scan(visit: _Visit) -> Sequence[_Known] | None:
    layout = scan_layout(visit.eqn)
    if layout is None:
        return None
    n_consts, n_carry = layout
    inputs = list(visit.values[: n_consts + n_carry])
    for value in visit.values[n_consts + n_carry :]:
        if isinstance(value, _Leaf):
            visit.recorder.stack(value.path, value.labels[0])
            value = value.with_labels(value.labels[1:])
        inputs.append(value)
    body, _ = opened(visit.eqn.params["jaxpr"])
    outputs = _walk(visit.recorder, body, inputs, visit.trips * visit.eqn.params["length"])
    return [*outputs[:n_carry], *[None] * (len(outputs) - n_carry)]


def _while(visit: _Visit) -> Sequence[_Known] | None:
    params = visit.eqn.params
    if not {"cond_nconsts", "body_nconsts", "cond_jaxpr", "body_jaxpr"} <= set(params):
        return None
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    test, _ = opened(params["cond_jaxpr"])
    body, _ = opened(params["body_jaxpr"])
    carry = list(visit.values[n_cond + n_body :])
    _walk(visit.recorder, test, [*visit.values[:n_cond], *carry], visit.trips)
    return _walk(visit.recorder, body, list(visit.values[n_cond:]), visit.trips)


def _cond(visit: _Visit) -> Sequence[_Known] | None:
    branches = [opened(branch)[0] for branch in visit.eqn.params.get("branches", ())]
    results = [_walk(visit.recorder, branch, visit.values[1:], visit.trips) for branch in branches]
    return results[0] if results else None


_HANDLERS: dict[str, Callable[[_Visit], Sequence[_Known] | None]] = {
    "transpose": _moved(_transpose),
    "squeeze": _moved(_squeeze),
    "broadcast_in_dim": _moved(_broadcast),
    "reshape": _moved(_reshape),
    "slice": _moved(_slice),
    "dynamic_slice": _moved(_slice),
    "split": _moved(lambda visit, leaf: leaf.labels),
    "dot_general": _dot_general,
    "gather": _gather,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(
        "jit pjit checkpoint remat remat2 closed_call core_call custom_jvp_call custom_vjp_call "
        "custom_vjp_call_jaxpr shard_map".split(),
        _call,
    ),
}
