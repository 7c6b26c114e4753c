"""Checkpoints of adapters: the arrays, a manifest, and fingerprints of the base model."""

from jax_lora.checkpoint.adapter_checkpoint import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
