"""LoRA for any JAX function: `lora_apply` turns `model.apply` into its LoRA version."""

from jax_lora import errors, paths
from jax_lora.adapter import Adapter, LoraPair, LoraWeight, WholeWeight, combine, partition
from jax_lora.config import LoraConfig
from jax_lora.dropout import dropout
from jax_lora.init import lora_init
from jax_lora.kernel import Kernel
from jax_lora.transform import find_kernels, lora_apply

__all__ = (
    "Adapter",
    "Kernel",
    "LoraConfig",
    "LoraPair",
    "LoraWeight",
    "WholeWeight",
    "combine",
    "dropout",
    "errors",
    "find_kernels",
    "lora_apply",
    "lora_init",
    "partition",
    "paths",
)
