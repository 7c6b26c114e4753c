"""Sites: every module that an adapter's file may name, and where its kernel lies here.

`names` maps a kernel's path to the module's name, with "{layer}" for the position in a stack; here
it is written out, one `Site` for each module.
"""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Iterator, Mapping
from typing import Any

from jax_lora import paths
from jax_lora.adapter import is_adapted
from jax_lora.errors import AmbiguousKernelError, StructureError, format_error
from jax_lora.kernels.kernel import Kernel

_MODULE, _PARAMETER = "module", "parameter"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameters that `names` has a name for.

    Args:
      path: Its path.
      template: The name of its modules, with braces.
      shape: Its shape.
      kernel: Which of its axes are inputs, outputs and stack.
      is_table: Whether it is looked up and not multiplied with.
      is_parameter: Whether the name is that of a parameter and not of a module with one weight:
        experts, whose module holds several, and routers.
    """

    path: str
    template: str
    shape: tuple[int, ...]
    kernel: Kernel
    is_table: bool
    is_parameter: bool

    @property
    def depth(self) -> int:
        """How many stack axes the name's braces stand for."""
        return len(braces(self.template))

    def modules(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every module's name, and its position in the stack."""
        fields = braces(self.template)
        stack = [self.shape[axis] for axis in self.kernel.stack_axes[: self.depth]]
        for position in itertools.product(*map(range, stack)):
            yield self.template.format(**dict(zip(fields, position, strict=True))), position


@dataclasses.dataclass(frozen=True)
class Site:
    """One module, or one parameter that is adapted like a module.

    Args:
      module: Its name.
      leaf: The leaf that holds its kernel.
      position: Where in the stack.
    """

    module: str
    leaf: Leaf
    position: tuple[int, ...]


def braces(template: str) -> tuple[str, ...]:
    """The names in a template's braces, in order.

    Example:
      >>> braces("model.layers.{layer}.mlp.experts.{expert}.w1")
      ('layer', 'expert')
    """
    return tuple(field for _, field, _, _ in string.Formatter().parse(template) if field)


def find_leaves(
    tree: Any, names: Mapping[str, str], kernels: Mapping[str, Kernel] | None = None
) -> dict[str, Leaf]:
    """Match `names` with the leaves of a tree.

    Args:
      tree: Parameters, or `{"params": parameters}`; arrays or `jax.ShapeDtypeStruct`s.
      names: Path of a kernel, with or without "params/" -> name of its module.
      kernels: What `find_kernels` found; without it, axes follow from the braces: a stack axis
        each, and then (in, out).

    Returns:
      A `Leaf` for each name, by path.

    Raises:
      StructureError: A path that the tree lacks.
      AmbiguousKernelError: A leaf whose axes only `kernels` could tell.
    """
    have = {path: leaf for path, leaf in paths.flatten_with_paths(tree, is_leaf=is_adapted)[0]}
    shapes = {path: tuple(getattr(leaf, "base", leaf).shape) for path, leaf in have.items()}
    found = {}
    for name, template in names.items():
        path = name if name in shapes else f"params/{name}"
        if path not in shapes:
            near = ", ".join(paths.nearest(name, shapes, 3))
            raise StructureError(
                format_error(
                    f"names: {name}",
                    got="no such leaf in the parameters",
                    expected=f"a path of the parameters; the nearest are {near}",
                    fix="Pass the parameters and the names of the same model.",
                )
            )
        found[path] = describe(path, template, shapes[path], (kernels or {}).get(path))
    return found


def describe(
    path: str, template: str, shape: tuple[int, ...], kernel: Kernel | None = None
) -> Leaf:
    """Work out how a leaf stands in an adapter's file.

    Args:
      path: Its path.
      template: The name of its modules.
      shape: Its shape.
      kernel: What `find_kernels` found of it, or None.

    Returns:
      The leaf.

    Raises:
      AmbiguousKernelError: Its axes do not follow from the name.
    """
    is_table = kernel.kind == "embedding" if kernel else path.split("/")[-1] == "embedding"
    owner = template.split(".")[-2:-1]
    of_experts = owner == ["experts"] and len(shape) == len(braces(template)) + 3
    if kernel is None:
        kernel = _kernel(path, template, shape, of_experts)
    is_parameter = of_experts or template.endswith(".weight")
    return Leaf(path, template, shape, kernel, is_table, is_parameter)


def _kernel(path: str, template: str, shape: tuple[int, ...], of_experts: bool) -> Kernel:
    depth = len(braces(template)) + of_experts
    if len(shape) - depth > 2:
        raise AmbiguousKernelError(
            format_error(
                path,
                got=f"shape {shape} for the name {template!r}",
                expected="an axis for each brace, and then (in, out)",
                fix="Pass kernels=jl.find_kernels(model.apply, variables, *args).",
            )
        )
    stack = tuple(range(depth))
    matrix = len(shape) - depth == 2  # else a norm or a bias, which is trained whole or not at all
    ins, outs = ((depth,), (depth + 1,)) if matrix else ((), tuple(range(depth, len(shape))))
    return Kernel(path, shape, None, "dense", ins, outs, stack)


def sites_of(leaves: Mapping[str, Leaf]) -> dict[str, Site]:
    """Every module of some leaves, by name.

    Args:
      leaves: Leaves by path.

    Returns:
      Sites by the module's name, in the order of the leaves.
    """
    return {
        module: Site(module, leaf, position)
        for leaf in leaves.values()
        for module, position in leaf.modules()
    }
