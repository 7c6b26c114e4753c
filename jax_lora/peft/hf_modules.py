"""The PyTorch modules that correspond to the leaves of a model.

`names` maps the path of a leaf to a module name with "{layer}" for the index in a layer stack; a
`Site` is one module of such a template.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from jax_lora import paths
from jax_lora.adapter import base_of, is_adapted
from jax_lora.errors import AmbiguousKernelError, StructureError
from jax_lora.kernels.kernel import Kernel


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf with an entry in `names`."""

    path: str
    template: str  # name of its modules, with braces for the position in the stack
    shape: tuple[int, ...]
    kernel: Kernel  # the roles of its axes
    is_table: bool  # an embedding table
    # The name is that of a parameter of a module, not of a module with one weight, as for experts
    # and routers.
    is_parameter: bool
    # The output columns of the leaf that the module has, as (start, stop), if modules are side by
    # side in one leaf; None: all.
    columns: tuple[int, int] | None = None

    @property
    def depth(self) -> int:
        """Number of stack axes that have braces in the template."""
        return len(paths.braces(self.template))

    def modules(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name of every module and its position in the stack."""
        fields = paths.braces(self.template)
        stack = [self.shape[axis] for axis in self.kernel.stack_axes[: self.depth]]
        for position in itertools.product(*map(range, stack)):
            yield self.template.format(**dict(zip(fields, position, strict=True))), position


@dataclasses.dataclass(frozen=True)
class Site:
    """A module, or a parameter that PEFT adapts like a module."""

    module: str
    leaf: Leaf
    position: tuple[int, ...]  # in the stack

    @property
    def index(self) -> tuple[Any, ...]:
        """The index of the module's weight in its leaf."""
        columns = self.leaf.columns
        return self.position if columns is None else (*self.position, ..., slice(*columns))


def find_leaves(
    tree: Any, names: Mapping[str, str], kernels: Mapping[str, Kernel] | None = None
) -> dict[str, Leaf]:
    """Find the leaves of `names` in a tree of arrays or `jax.ShapeDtypeStruct`s, by path.

    The paths in `names` may lack "params/". Without `kernels`, a leaf has a stack axis for each of
    the braces, followed by (in, out).
    """
    leaves = paths.flatten_with_paths(tree, is_leaf=is_adapted)[0]
    shapes = {path: tuple(base_of(leaf).shape) for path, leaf in leaves}
    found = {}
    for name, template in names.items():
        path = name if name in shapes else f"params/{name}"
        if path not in shapes:
            near = ", ".join(paths.nearest(name, shapes, 3))
            raise StructureError(
                f"names: {name}",
                got="no such leaf in the parameters",
                expected=f"a path of the parameters; the closest paths are {near}",
                fix="Pass the parameters and the names of the same model.",
            )
        found[path] = describe(path, template, shapes[path], (kernels or {}).get(path))
    return found


def describe(
    path: str, template: str, shape: tuple[int, ...], kernel: Kernel | None = None
) -> Leaf:
    """Describe an entry of `names`; without `kernel`, the axes follow from the template."""
    is_table = kernel.kind == "embedding" if kernel else path.split("/")[-1] == "embedding"
    owner = template.split(".")[-2:-1]
    of_experts = owner == ["experts"] and len(shape) == len(paths.braces(template)) + 3
    if kernel is None:
        kernel = _kernel(path, template, shape, of_experts)
    is_parameter = of_experts or template.endswith(".weight")
    return Leaf(path, template, shape, kernel, is_table, is_parameter)


def _kernel(path: str, template: str, shape: tuple[int, ...], of_experts: bool) -> Kernel:
    depth = len(paths.braces(template)) + of_experts
    if len(shape) - depth > 2:
        raise AmbiguousKernelError(
            path,
            got=f"shape {shape} for the name {template!r}",
            expected="a stack axis for each pair of braces, followed by (in, out)",
            fix="Pass kernels=jl.find_kernels(model.apply, variables, *args).",
        )
    stack = tuple(range(depth))
    matrix = len(shape) - depth == 2  # otherwise a norm or a bias, which has no factors
    ins, outs = ((depth,), (depth + 1,)) if matrix else ((), tuple(range(depth, len(shape))))
    return Kernel(path, shape, None, "dense", ins, outs, stack)


def sites_of(leaves: Mapping[str, Leaf]) -> dict[str, Site]:
    """Return all modules of some leaves by name, in the order of the leaves."""
    return {
        module: Site(module, leaf, position)
        for leaf in leaves.values()
        for module, position in leaf.modules()
    }
