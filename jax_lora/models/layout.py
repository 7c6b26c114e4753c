"""The mapping between a model's parameters and the tensors of a checkpoint.

An architecture gives one table, parameter path -> `Placement`. Loading, saving and adapter export
all read it, so the three cannot disagree.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jax_lora.paths import braces


@dataclasses.dataclass(frozen=True)
class Placement:
    """The tensors of one parameter.

    Args:
      tensors: Names of the tensors in the files. "{layer}" and "{expert}" stand for the index in a
        stack: a parameter with both has the axes (layers, experts, ...). Several names are equal
        parts of one parameter, side by side along its last axis.
      transposed: Whether the files hold (out, in), as torch's `Linear` does, and the parameter is
        (in, out).
      module: The name that adapters use: the Hugging Face module, or the name of the parameter
        itself where the module has several kernels. None if adapters cannot name it.
    """

    tensors: tuple[str, ...]
    transposed: bool = False
    module: str | None = None

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names of the stack axes, outermost first, as in ("layer", "expert")."""
        return braces(self.tensors[0])

    def expand(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], list[str]]]:
        """Iterate over the stack of a parameter of this shape.

        Yields:
          Each index in the stack, and the names of the tensors at that index.

        Example:
          >>> part = Placement(("h.{layer}.w",))
          >>> list(part.expand((2, 5)))
          [((0,), ['h.0.w']), ((1,), ['h.1.w'])]
        """
        names = self.stacked
        for index in itertools.product(*map(range, shape[: len(names)])):
            numbers = dict(zip(names, index, strict=True))
            yield index, [name.format(**numbers) for name in self.tensors]

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Compute the shape of each tensor in the files, for a parameter of this shape."""
        part = (*shape[len(self.stacked) : -1], shape[-1] // len(self.tensors))
        return (*part[:-2], part[-1], part[-2]) if self.transposed else part

    def to_files(self, part: np.ndarray) -> list[np.ndarray]:
        """Split the parameter at one stack index into the tensors of the files."""
        pieces = np.split(part, len(self.tensors), axis=-1)
        return [np.ascontiguousarray(self._transpose(piece)) for piece in pieces]

    def from_files(self, tensors: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
        """Join tensors of the files into the parameter at one stack index."""
        pieces = [self._transpose(tensor).astype(dtype) for tensor in tensors]
        return np.ascontiguousarray(np.concatenate(pieces, axis=-1) if pieces[1:] else pieces[0])

    def _transpose(self, array: np.ndarray) -> np.ndarray:
        return array.swapaxes(-1, -2) if self.transposed else array


Layout = dict[str, Placement]


def dense(path: str, module: str, *, bias: bool = False, transposed: bool = True) -> Layout:
    """Place a dense layer: its kernel, which GPT-2's files hold as (in, out), and its bias if any.

    Example:
      >>> list(dense("lm_head", "lm_head"))
      ['lm_head/kernel']
    """
    placed = {f"{path}/kernel": Placement((f"{module}.weight",), transposed, module)}
    return placed | (vector(f"{path}/bias", f"{module}.bias") if bias else {})


def embedding(path: str, module: str) -> Layout:
    """Place an embedding table, given the path of its module and the Hugging Face module."""
    return {f"{path}/embedding": Placement((f"{module}.weight",), module=module)}


def vector(path: str, tensor: str) -> Layout:
    """Place a parameter that the file stores unchanged, such as a norm's scale or a bias.

    A scale has the name of its module, so that `modules_to_save` of an adapter can include it.
    """
    module, _, what = tensor.rpartition(".")
    return {path: Placement((tensor,), module=module if what == "weight" else None)}


def layer_norm(path: str, module: str) -> Layout:
    """Place a norm with a scale and a bias."""
    return vector(f"{path}/scale", f"{module}.weight") | vector(f"{path}/bias", f"{module}.bias")
