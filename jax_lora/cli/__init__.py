"""The `jax-lora` command; a file per verb."""

from jax_lora.cli.main import main

__all__ = ("main",)
