"""Flax Transformers that read and write Hugging Face checkpoints."""

from jax_lora.models.decoder_inputs import KVCache
from jax_lora.models.llama import Llama, LlamaConfig
from jax_lora.models.load_checkpoint import load
from jax_lora.models.save_checkpoint import save

__all__ = ["KVCache", "Llama", "LlamaConfig", "load", "save"]
