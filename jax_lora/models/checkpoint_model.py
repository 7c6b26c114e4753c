"""The base of all models: fields, names of the parameters in checkpoints, and common modules."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jax_lora.models.layout import Layout

__all__ = ["CheckpointModel", "linear", "token_table"]


class CheckpointModel(nn.Module):
    """Base of the models; `jax_lora.models.load` makes one from a Hugging Face folder.

    Attributes:
      config: Sizes and switches, in Hugging Face's terms; of the architecture's own class.
      remat: Whether to recompute each layer's activations in the backward pass, to save memory.
      param_dtype: Dtype in which `init` makes the parameters; `apply` computes in the dtype of the
        parameters that it is given.
    """

    config: Any
    remat: bool = False
    param_dtype: Any = jnp.float32

    def layout(self) -> Layout:
        """Place every parameter in the files."""
        raise NotImplementedError

    @property
    def hf_names(self) -> dict[str, str]:
        """Path of every kernel, embedding and norm -> its Hugging Face module.

        "{layer}" stands for the index in a stack.

        Example:
          >>> import jax_lora as jl
          >>> jl.models.Llama(jl.models.LlamaConfig()).hf_names["layers/attn/q_proj/kernel"]
          'model.layers.{layer}.self_attn.q_proj'
        """
        placed = self.layout().items()
        return {path: place.module for path, place in placed if place.module is not None}


def linear(config: Any, features: int, bias: bool, param_dtype: Any) -> nn.Dense:
    """Make a dense layer whose kernel is initialized with `config.initializer_range`."""
    initial = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, use_bias=bias, kernel_init=initial, param_dtype=param_dtype)


def token_table(config: Any, rows: int, features: int, param_dtype: Any) -> nn.Embed:
    """Make an embedding table that is initialized with `config.initializer_range`."""
    initial = nn.initializers.normal(config.initializer_range)
    return nn.Embed(rows, features, embedding_init=initial, param_dtype=param_dtype)
