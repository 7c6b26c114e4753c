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
from jax_lora.errors import AmbiguousKernelError, StructureError, format_error
from jax_lora.kernels.kernel import Kernel

_MODULE, _PARAMETER = "module", "parameter"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf with an entry in `names`.

    Args:
      path: Path of the leaf.
      template: Name of its modules, with braces for the position in the stack.
      shape: Shape of the leaf.
      kernel: The roles of its axes.
      is_table: Whether it is an embedding table.
      is_parameter: Whether the name belongs to a parameter of a module instead of a module with one
        weight, as for experts and routers.
    """

    path: str
    template: str
    shape: tuple[int, ...]
    kernel: Kernel
    is_table: bool
    is_parameter: bool

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
    """A module, or a parameter that PEFT adapts like a module.

    Args:
      module: Name of the module.
      leaf: The leaf with its kernel.
      position: Position in the stack.
    """

    module: str
    leaf: Leaf
    position: tuple[int, ...]


def find_leaves(
    tree: Any, names: Mapping[str, str], kernels: Mapping[str, Kernel] | None = None
) -> dict[str, Leaf]:
    """Find the leaves of `names` in a tree.

    Args:
      tree: Parameters, or `{"params": parameters}`; arrays or `jax.ShapeDtypeStruct`s.
      names: Path of a kernel, with or without "params/" -> name of its module.
      kernels: The result of `find_kernels`. Without it, a leaf has a stack axis for each of the
        braces, followed by (in, out).

    Returns:
      A `Leaf` by path for each name.

    Raises:
      StructureError: A path is not in the tree.
      AmbiguousKernelError: The axes of a leaf are not known without `kernels`.
    """
    have = {path: leaf for path, leaf in paths.flatten_with_paths(tree, is_leaf=is_adapted)[0]}
    shapes = {path: tuple(base_of(leaf).shape) for path, leaf in have.items()}
    found = {}
    for name, template in names.items():
        path = name if name in shapes else f"params/{name}"
        if path not in shapes:
            near = ", ".join(paths.nearest(name, shapes, 3))
            raise StructureError(
                format_error(
                    f"names: {name}",
                    got="no such leaf in the parameters",
                    expected=f"a path of the parameters; the closest paths are {near}",
                    fix="Pass the parameters and the names of the same model.",
                )
            )
        found[path] = describe(path, template, shapes[path], (kernels or {}).get(path))
    return found


def describe(
    path: str, template: str, shape: tuple[int, ...], kernel: Kernel | None = None
) -> Leaf:
    """Return the `Leaf` for one entry of `names`.

    Args:
      path: Path of the leaf.
      template: Name of its modules.
      shape: Shape of the leaf.
      kernel: Its kernel from `find_kernels`; None: the axes follow from the template.

    Raises:
      AmbiguousKernelError: The template does not determine the axes.
    """
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
            format_error(
                path,
                got=f"shape {shape} for the name {template!r}",
                expected="a stack axis for each pair of braces, followed by (in, out)",
                fix="Pass kernels=jl.find_kernels(model.apply, variables, *args).",
            )
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
