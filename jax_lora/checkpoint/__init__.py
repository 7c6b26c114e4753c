"""Checkpoints of adapters: arrays, a manifest, and the fingerprint of the base model."""

from jax_lora.checkpoint.adapter_checkpoint import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
