"""Load checkpoints of loralib, the library of the LoRA paper, from safetensors.

    <module>.lora_A   (r, in)
    <module>.lora_B   (out, r)

The files do not have alpha, so it is an argument.

Reference:
    Hu et al., LoRA (arXiv:2106.09685).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jax_lora.adapter import Adapter
from jax_lora.errors import AdapterFileError
from jax_lora.kernels.kernel import Kernel
from jax_lora.peft.adapter_config import DEFAULTS
from jax_lora.peft.hf_modules import find_leaves, sites_of
from jax_lora.peft.named_factors import assemble_factors, read_factors
from jax_lora.peft.tensor_file import read_tensors
from jax_lora.storage.safe_paths import given_path


def load_loralib(
    path: str | os.PathLike[str],
    variables: Any,
    *,
    names: Mapping[str, str],
    alpha: float,
    kernels: Mapping[str, Kernel] | None = None,
    dtype: Any = jnp.float32,
) -> Adapter:
    """Load the output of `loralib.lora_state_dict` from a safetensors file.

    Args:
      path: The safetensors file.
      variables: The base parameters, or `{"params": parameters}`.
      names: Path of each kernel -> name of its module in the file.
      alpha: `lora_alpha` of the layers; the scale is alpha / r.
      kernels: The result of `find_kernels`, for other axes than the stack and (in, out).
      dtype: Type of the factors; None for the type of the file.

    Returns:
      The adapter.

    Raises:
      AdapterFileError: The file is damaged or does not fit the base model. One message lists all
        problems.
    """
    file = given_path(path, AdapterFileError)
    sites = sites_of(find_leaves(variables, names, kernels))
    tensors = read_tensors(file.parent, file.name)
    found, problems = read_factors(tensors, sites, ("lora_A", "lora_B"), transposed=True)
    if problems:
        raise AdapterFileError(
            str(file),
            got=problems,
            expected="lora_A (r, in) and lora_B (out, r) of modules in names",
            fix="Save only lora_state_dict(model), and pass the names of its modules.",
        )
    config = {**DEFAULTS, "lora_alpha": alpha}
    return assemble_factors(found, sites, lambda rank: alpha / rank, config, dtype)
