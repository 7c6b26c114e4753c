"""The base class of all models, and the modules that they share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_lora.models.layout import Layout
from jax_lora.models.token_embedding import TokenEmbedding


class CheckpointModel(nn.Module):
    """Base of the models; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: The architecture's configuration, such as a `LlamaConfig` for a `Llama`.
      remat: What a layer keeps for its backward pass: `"none"` (everything), `"names"` or `"full"`
        (its input); see `remat_policy`. False means `"none"`, True `"full"`.
      param_dtype: Dtype of the parameters that `init` makes. `apply` ignores it and computes in the
        dtype of the parameters that are passed.
      attention: `"auto"`, `"dense"` or `"flash"`; see `choose_kernel`. Decoders only.
      platform: Target platform, `"cpu"`, `"gpu"` or `"tpu"`; None: that of the default backend.
      mesh: Devices that share the rows of a batch along the axes `"data"` and `"fsdp"`, and heads
        along `"tensor"`; see `mesh_sharding`. Activations stay on the devices of their rows. None:
        one device.
    """

    config: Any
    remat: bool | str = "none"
    param_dtype: Any = jnp.float32
    attention: str = "auto"
    platform: str | None = None
    mesh: Mesh | None = None

    def layout(self) -> Layout:
        """Map the path of every parameter to its tensors in a checkpoint."""
        raise NotImplementedError

    @property
    def hf_names(self) -> dict[str, str]:
        """Map the path of every kernel, embedding and norm to the name of its PyTorch module.

        The name of a module in a layer stack has "{layer}" instead of the layer's index.

        Example:
          >>> import jax_lora as jl
          >>> jl.models.Llama(jl.models.LlamaConfig()).hf_names["layers/attn/q_proj/kernel"]
          'model.layers.{layer}.self_attn.q_proj'
        """
        placed = self.layout().items()
        return {path: place.module for path, place in placed if place.module is not None}


def dense_maker(config: Any, param_dtype: Any) -> Callable[..., nn.Dense]:
    """Return `nn.Dense` with kernels that are initialized with `config.initializer_range`."""
    initial = nn.initializers.normal(config.initializer_range)
    return functools.partial(nn.Dense, kernel_init=initial, param_dtype=param_dtype)


def linear(config: Any, features: int, bias: bool, param_dtype: Any) -> nn.Dense:
    """Make one dense layer with `dense_maker`."""
    return dense_maker(config, param_dtype)(features, use_bias=bias)


def token_table(config: Any, rows: int, features: int, param_dtype: Any) -> TokenEmbedding:
    """Make an embedding table that is initialized with `config.initializer_range`."""
    initial = nn.initializers.normal(config.initializer_range)
    return TokenEmbedding(rows, features, embedding_init=initial, param_dtype=param_dtype)
