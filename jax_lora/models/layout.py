"""Where each parameter of a model stands in a checkpoint's files.

An architecture gives one table, parameter path -> `Placement`. Loading, saving and adapter export
all read it, so the three cannot disagree.
"""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Layout", "Placement", "StandsInFiles", "decoder_layout", "dense", "vector"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one parameter stands.

    Args:
      tensors: Names of its tensors in the files. "{layer}" and "{expert}" stand for the position in
        a stack: a parameter with both has the axes (layers, experts, ...). Several names are
        equal parts of one parameter, side by side along its last axis.
      transposed: Whether the files hold (out, in), as torch's `Linear` does, and the parameter
        (in, out).
      module: What an adapter calls it: the Hugging Face module, or the parameter's own name where
        the module has several kernels. None if no adapter can name it.
    """

    tensors: tuple[str, ...]
    transposed: bool = False
    module: str | None = None

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names of the stack axes, outermost first, as in ("layer", "expert")."""
        return stack_names(self.tensors[0])

    def expand(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], list[str]]]:
        """Go through the stack of a parameter of this shape.

        Yields:
          Each position in the stack, and the names of the tensors that make up its part.

        Example:
          >>> part = Placement(("h.{layer}.w",))
          >>> list(part.expand((2, 5)))
          [((0,), ['h.0.w']), ((1,), ['h.1.w'])]
        """
        names = self.stacked
        for position in itertools.product(*map(range, shape[: len(names)])):
            numbers = dict(zip(names, position, strict=True))
            yield position, [name.format(**numbers) for name in self.tensors]

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each tensor in the files, for a parameter of this shape."""
        part = (*shape[len(self.stacked) : -1], shape[-1] // len(self.tensors))
        return (*part[:-2], part[-1], part[-2]) if self.transposed else part

    def to_files(self, part: np.ndarray) -> list[np.ndarray]:
        """Cut one position's part of the parameter into the tensors of the files."""
        pieces = np.split(part, len(self.tensors), axis=-1)
        return [np.ascontiguousarray(self._turned(piece)) for piece in pieces]

    def from_files(self, tensors: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
        """Join the tensors of the files into one position's part of the parameter."""
        pieces = [self._turned(tensor).astype(dtype) for tensor in tensors]
        return np.ascontiguousarray(np.concatenate(pieces, axis=-1) if pieces[1:] else pieces[0])

    def _turned(self, array: np.ndarray) -> np.ndarray:
        return array.swapaxes(-1, -2) if self.transposed else array


Layout = dict[str, Placement]


def stack_names(name: str) -> tuple[str, ...]:
    """The braces of a name, in order.

    Example:
      >>> stack_names("model.layers.{layer}.mlp.experts.{expert}.w1")
      ('layer', 'expert')
    """
    return tuple(field for _, field, _, _ in string.Formatter().parse(name) if field is not None)


def dense(path: str, module: str, *, bias: bool = False, transposed: bool = True) -> Layout:
    """Place a dense layer: the kernel, and its bias if it has one.

    Args:
      path: Path of the layer's parameters, without "kernel".
      module: The Hugging Face module.
      bias: Whether there is a bias.
      transposed: Whether the file holds (out, in); GPT-2's does not.

    Example:
      >>> list(dense("lm_head", "lm_head"))
      ['lm_head/kernel']
    """
    placed = {f"{path}/kernel": Placement((f"{module}.weight",), transposed, module)}
    return placed | (vector(f"{path}/bias", f"{module}.bias") if bias else {})


def vector(path: str, tensor: str) -> Layout:
    """Place a parameter that stands in the file as it is, such as a norm's scale or a bias.

    A module's weight can be trained whole beside an adapter, so it has the module's name.
    """
    module, _, what = tensor.rpartition(".")
    return {path: Placement((tensor,), module=module if what == "weight" else None)}


class StandsInFiles:
    """A model whose parameters are read from files, and whose adapters are named after these.

    Example:
      >>> class Head(StandsInFiles):
      ...     def layout(self):
      ...         return dense("head", "lm_head", bias=True)
      >>> Head().hf_names
      {'head/kernel': 'lm_head'}
    """

    def layout(self) -> Layout:
        """Where the parameters stand in the files."""
        raise NotImplementedError  # an architecture's own

    @property
    def hf_names(self) -> dict[str, str]:
        """Path of every kernel, embedding and norm -> its Hugging Face module.

        "{layer}" stands for the position in a stack.
        """
        placed = self.layout().items()
        return {path: place.module for path, place in placed if place.module is not None}


def decoder_layout(
    *,
    norms: Mapping[str, str],
    tied: bool,
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
    biased: tuple[str, ...] = (),
) -> Layout:
    """Place the parameters of a decoder of the usual names, all under "model.layers".

    Args:
      norms: Our name of each of a layer's norms -> Hugging Face's.
      tied: Whether the embedding is the output head too.
      attention: Names of the attention's dense layers, ours and Hugging Face's.
      mlp: Names of the feed-forward part's.
      biased: Paths of the layers with a bias, such as "attn" (all of it) or "attn/q_proj".

    Returns:
      The layout.
    """
    placed: dict[str, Placement] = {
        "embed_tokens/embedding": Placement(
            ("model.embed_tokens.weight",), module="model.embed_tokens"
        )
    }
    for part, module, names in (("attn", "self_attn", attention), ("mlp", "mlp", mlp)):
        for name in names:
            bias = part in biased or f"{part}/{name}" in biased
            hf_name = f"model.layers.{{layer}}.{module}.{name}"
            placed |= dense(f"layers/{part}/{name}", hf_name, bias=bias)
    for ours, theirs in norms.items():
        placed |= vector(f"layers/{ours}/scale", f"model.layers.{{layer}}.{theirs}.weight")
    placed |= vector("norm/scale", "model.norm.weight")
    return placed if tied else placed | dense("lm_head", "lm_head")
