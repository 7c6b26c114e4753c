"""Read weights that bitsandbytes stored in NF4, without quantizing them again.

A quantized weight is several tensors: the codes under the weight's name, and beside it the scales,
their tables and a description in JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np

from jax_lora.errors import ModelError
from jax_lora.models.tensor_files import DTYPES, Tensor
from jax_lora.quantization import nf4
from jax_lora.storage import schema
from jax_lora.storage.json_files import parse_object
from jax_lora.storage.limits import limit

_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", _STATE)
_NAMES = {name: stored for stored, name in DTYPES.items()}
_KINDS = {
    "quant_type": schema.choice("nf4"),
    "blocksize": schema.choice(nf4.BLOCK),
    "dtype": schema.choice(*_NAMES),
    "shape": schema.list_of(schema.integer(1, 2**31 - 1)),
    "nested_blocksize": schema.choice(nf4.SPAN),
    "nested_offset": schema.NUMBER,
}
_FIX = "take the model's original, and quantize it when it is loaded."


class NF4Tensor:
    """A weight in an open file, as codes and scales: shape and dtype are those of the weight."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]):
        """Check the description of a weight; its codes are not read yet.

        Raises:
          ModelError: The weight is not stored in NF4 with double quantization.
        """
        self._name = name
        self._parts = {
            part: tensors[name + part] for part in ("", *_PARTS) if name + part in tensors
        }
        missing = [name + part for part in _PARTS if part not in self._parts]
        if missing:
            got = f"{name} without {', '.join(missing)}"
            raise ModelError(name, got=got, expected="NF4 with double quantization", fix=_FIX)
        state = _state(name, self._parts[_STATE])
        self.shape, self.dtype = tuple(state["shape"]), _NAMES[state["dtype"]]
        self._offset = np.float32(state["nested_offset"])
        blocks = -(-math.prod(self.shape) // nf4.BLOCK)
        sizes = {
            "": (-(-math.prod(self.shape) // 2), 1),
            ".absmax": (blocks,),
            ".nested_absmax": (-(-blocks // nf4.SPAN),),
            ".nested_quant_map": (256,),
            ".quant_map": (16,),
        }
        for part, shape in sizes.items():
            if self._parts[part].shape != shape:
                got = f"{name}{part} of shape {self._parts[part].shape}"
                raise ModelError(
                    name, got=got, expected=f"the shape {shape}", fix="download the file again."
                )

    def codes(self, columns: int) -> dict[str, np.ndarray]:
        """Read the arrays of one matrix, in the format of `nf4.encode`.

        `columns` is the size of a row of the matrix: a multiple of a block, or else the whole
        weight is one row.

        Raises:
          ModelError: The tables are not those of NF4.
        """
        read = {part: self._parts[part].read() for part in self._parts if part != _STATE}
        tables = {".quant_map": nf4.CODES, ".nested_quant_map": nf4.scale_table()}
        for part, expected in tables.items():
            if not np.array_equal(read[part], expected):
                raise ModelError(
                    self._name + part, got="another table", expected="the table of NF4", fix=_FIX
                )
        scales = read[".absmax"]
        codes = np.full(scales.size * nf4.BLOCK // 2, 0x77, np.uint8)  # 7 is the code of zero
        codes[: read[""].size] = read[""].reshape(-1)
        rows = 1 if columns % nf4.BLOCK else math.prod(self.shape) // columns
        return {
            "codes": codes.reshape(rows, -1),
            "scales": scales.reshape(rows, -1),
            "spans": read[".nested_absmax"].astype(np.float32),
            "offset": np.asarray(self._offset),
        }

    def read(self) -> np.ndarray:
        """Read the weight, computed from its codes."""
        flat = np.asarray(nf4.decode(self.codes(1)))[0, : math.prod(self.shape)]
        return flat.reshape(self.shape).astype(DTYPES[self.dtype])


AnyTensor = Tensor | NF4Tensor


def with_nf4_weights(tensors: Mapping[str, Tensor]) -> dict[str, AnyTensor]:
    """Replace the parts of each NF4 weight, of all tensors of a folder, by one `NF4Tensor`.

    Raises:
      ModelError: A weight is stored in another format of bitsandbytes.
    """
    weights = {name.removesuffix(_STATE) for name in tensors if name.endswith(_STATE)}
    parts = {name + part for name in weights for part in _PARTS}
    found: dict[str, AnyTensor] = {
        name: each for name, each in tensors.items() if name not in parts
    }
    return found | {name: NF4Tensor(name, tensors) for name in sorted(weights & tensors.keys())}


def _state(name: str, tensor: Tensor) -> dict[str, Any]:
    where = name + _STATE
    if math.prod(tensor.shape) > limit("config_bytes"):
        raise ModelError(
            where, got=f"{tensor.shape} bytes", expected="a description in JSON", fix=_FIX
        )
    raw = parse_object(tensor.read().tobytes(), Path(where), ModelError)
    problems = list(schema.problems(raw, schema.record(_KINDS)))
    if problems:
        raise ModelError(
            where, got="; ".join(problems), expected="the description of an NF4 weight", fix=_FIX
        )
    return raw
