"""Read a Hugging Face folder's tensors into `Llama`'s stacked parameters.

Each tensor goes from its file straight into its place in a stack that is updated in place, so the
peak is the model and one layer's tensor. Shapes are compared before anything is allocated.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open

from jax_lora.errors import ModelError, explain
from jax_lora.models.folder import member, weight_files
from jax_lora.models.hf_names import tensor_names
from jax_lora.models.llama import Llama, parameter_shapes
from jax_lora.models.llama_config import LlamaConfig
from jax_lora.models.read_config import read_config

__all__ = ["load"]

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load(
    path: str | os.PathLike[str], dtype: Any = None, *, remat: bool = False
) -> tuple[Llama, dict[str, Any]]:
    """Read a Llama-family model from a Hugging Face folder.

    Nothing in the folder is run, and no file outside it is read.

    Args:
      path: folder with `config.json` and `model.safetensors`, or shards with their index.
      dtype: of the parameters, and so of the arithmetic; None keeps the files' (float32 if
        they differ among themselves).
      remat: recompute activations in the backward pass, to save memory.

    Returns:
      The module and its parameters: `model.apply({"params": params}, input_ids)`.

    Raises:
      ModelError: if the folder cannot be read, asks for what is not implemented, or its tensors
        are not those of its configuration (one message lists them all).

    Example:
      >>> from jax_lora.bundled import model_path
      >>> model, params = load(model_path())
      >>> params["layers"]["attn"]["q_proj"]["kernel"].dtype
      dtype(bfloat16)
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(
            explain(
                str(folder),
                got="no such folder",
                expected="a Hugging Face model folder",
                fix="check the path; models are not downloaded.",
            )
        )
    model = Llama(read_config(folder), remat=remat)
    with ExitStack() as stack:
        tensors = _open_all(folder, stack)
        expected = _expected(model)
        _compare(folder, model.config, expected, tensors)
        # Without 64-bit mode there is no float64 to load into.
        dtype = jax.dtypes.canonicalize_dtype(dtype or _common_dtype(tensors))
        flat = {
            leaf_path: _read_leaf(leaf_path, names, shape, tensors, dtype)
            for leaf_path, (names, shape) in expected.items()
        }
    return model.clone(param_dtype=dtype), unflatten_dict(flat, sep="/")


class _Tensor:
    """A tensor in an open file: its shape and dtype at once, its numbers when asked."""

    def __init__(self, file: Any, name: str):
        piece = file.get_slice(name)
        self.shape, self.dtype = tuple(piece.get_shape()), piece.get_dtype()
        self._file, self._name = file, name

    def read(self) -> np.ndarray:
        return self._file.get_tensor(self._name)


def _open_all(folder: Path, stack: ExitStack) -> dict[str, _Tensor]:
    """Every tensor of the folder by name; files stay open as long as `stack`."""
    tensors: dict[str, _Tensor] = {}
    for file_name, named in weight_files(folder).items():
        path = member(folder, file_name)
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
            found = set(file.keys())
            tensors.update({name: _Tensor(file, name) for name in sorted(found)})
        except (SafetensorError, OSError) as error:
            raise ModelError(
                explain(
                    str(path),
                    got=f"a broken file: {error}",
                    expected="a safetensors file",
                    fix="fetch the file again.",
                )
            ) from error
        if named is not None and named - found:
            raise ModelError(
                explain(
                    str(path),
                    got="a shard without " + ", ".join(sorted(named - found)),
                    expected="the tensors that the index places there",
                    fix="fetch the shard and the index again.",
                )
            )
    return tensors


def _expected(model: Llama) -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """Parameter path -> its tensors' names in order of layer, and the parameter's shape."""
    names = tensor_names(model.config)
    layers = range(model.config.num_hidden_layers)
    return {
        path: (
            [names[path].format(layer=i) for i in layers]
            if "{layer}" in names[path]
            else [names[path]],
            shape,
        )
        for path, shape in parameter_shapes(model).items()
    }


def _tensor_shape(path: str, count: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one tensor in the file, of the parameter at `path`."""
    if path.startswith("layers/"):
        shape = shape[1:]
    return shape[::-1] if path.endswith("/kernel") else shape  # torch keeps (out, in)


def _compare(folder: Path, config: LlamaConfig, expected: Any, tensors: Any) -> None:
    """Refuse a folder whose tensors are not exactly those of its configuration."""
    problems = list(_differences(config, expected, tensors))
    if problems:
        raise ModelError(
            explain(
                str(folder),
                got="tensors that do not fit config.json:\n    " + "\n    ".join(problems),
                expected="exactly the tensors of this configuration",
                fix="check that config.json belongs to these files and that no shard is missing.",
            )
        )


def _differences(config: LlamaConfig, expected: Any, tensors: Any) -> Iterator[str]:
    known = set()
    for path, (names, shape) in expected.items():
        want = _tensor_shape(path, len(names), shape)
        for name in names:
            known.add(name)
            tensor = tensors.get(name)
            if tensor is None:
                yield f"missing: {name} {want}"
            elif tensor.shape != want:
                yield f"wrong shape: {name} is {tensor.shape}, expected {want}"
            elif tensor.dtype not in _DTYPES:
                yield f"wrong dtype: {name} is {tensor.dtype}, expected {' or '.join(_DTYPES)}"
    for name in sorted(set(tensors) - known):
        if not _is_redundant(name, config):
            yield f"extra: {name} {tensors[name].shape}"


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    """Tensors some files carry although the configuration alone gives them."""
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith("rotary_emb.inv_freq")


def _common_dtype(tensors: dict[str, _Tensor]) -> Any:
    """The dtype of the files; float32 where they mix, which holds every half exactly."""
    stored = {_DTYPES[tensor.dtype] for tensor in tensors.values() if tensor.dtype in _DTYPES}
    return stored.pop() if len(stored) == 1 else "float32"


def _read_leaf(
    path: str, names: list[str], shape: tuple[int, ...], tensors: dict[str, _Tensor], dtype: Any
) -> jax.Array:
    transposed = path.endswith("/kernel")
    if not path.startswith("layers/"):
        return jnp.asarray(_oriented(tensors[names[0]], transposed, dtype))
    leaf = jnp.zeros(shape, dtype)  # (layers, in, out)
    for layer, name in enumerate(names):
        leaf = _put_layer(leaf, _oriented(tensors[name], transposed, dtype), np.int32(layer))
    return leaf


def _oriented(tensor: _Tensor, transposed: bool, dtype: Any) -> np.ndarray:
    value = tensor.read()
    value = value.T if transposed else value
    return np.ascontiguousarray(value.astype(dtype))


@partial(jax.jit, donate_argnums=0)
def _put_layer(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
    """Write one layer into the stack; donated, so that no second stack is ever held."""
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, axis=0)
