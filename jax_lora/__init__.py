"""LoRA for any JAX function: `lora_apply` turns `model.apply` into its LoRA version.

    kernels = jl.find_kernels(model.apply, variables, tokens)
    adapter = jl.lora_init(key, variables, jl.LoraConfig(rank=8), kernels=kernels)
    y = jl.lora_apply(model.apply)(jl.combine(variables, adapter), tokens)

Every function accepts Linen variables, NNX state, or any other pytree of parameters.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jax_lora import errors, paths
from jax_lora.adapter import Adapter, LoraWeight, combine, partition
from jax_lora.algebra.base_weight import Recipe
from jax_lora.checkpoint import load_adapter, save_adapter
from jax_lora.config import LoraConfig
from jax_lora.dropout import dropout
from jax_lora.init import lora_init
from jax_lora.kernels.kernel import Kernel
from jax_lora.merge import merge, unmerge
from jax_lora.optimizers import lora_plus, masked_optimizer, trainable_mask
from jax_lora.quantize import QuantizedWeight, dequantize, quantize
from jax_lora.sharding import adapter_shardings
from jax_lora.summary import summary
from jax_lora.transform import explain, find_kernels, lora_apply
from jax_lora.updates import LoraPair, TokenRows

if TYPE_CHECKING:
    from jax_lora import finetune, models, peft

__version__ = "0.1.0"

__all__ = (
    "Adapter",
    "Kernel",
    "LoraConfig",
    "LoraPair",
    "LoraWeight",
    "QuantizedWeight",
    "Recipe",
    "TokenRows",
    "adapter_shardings",
    "combine",
    "dequantize",
    "dropout",
    "errors",
    "explain",
    "find_kernels",
    "finetune",
    "load_adapter",
    "lora_apply",
    "lora_init",
    "lora_plus",
    "masked_optimizer",
    "merge",
    "models",
    "partition",
    "paths",
    "peft",
    "quantize",
    "save_adapter",
    "summary",
    "trainable_mask",
    "unmerge",
)


def __getattr__(name: str) -> Any:
    # Imported when they are first used, because `import jax_lora` stays light without them.
    if name in ("finetune", "models", "peft"):
        return importlib.import_module(f"jax_lora.{name}")
    raise AttributeError(f"module 'jax_lora' has no attribute {name!r}")
