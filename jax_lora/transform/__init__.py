"""The transform: a function's jaxpr, interpreted again with low-rank values."""

from jax_lora.transform.apply import lora_apply
from jax_lora.transform.explain import explain
from jax_lora.transform.find_kernels import find_kernels

__all__ = ("explain", "find_kernels", "lora_apply")
