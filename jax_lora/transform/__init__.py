"""Function transforms: interpret a function's jaxpr with low-rank weights."""

from jax_lora.transform.apply import lora_apply
from jax_lora.transform.explain import explain
from jax_lora.transform.find_kernels import find_kernels

__all__ = ("explain", "find_kernels", "lora_apply")
