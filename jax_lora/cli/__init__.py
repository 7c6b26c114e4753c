"""The `jax-lora` command, with one file per subcommand."""

from jax_lora.cli.main import main

__all__ = ("main",)
