"""The transform: a function's jaxpr, evaluated again with low-rank values."""

from jax_lora.transform.analysis import find_kernels
from jax_lora.transform.apply import lora_apply
from jax_lora.transform.explanation import explain

__all__ = ("explain", "find_kernels", "lora_apply")
