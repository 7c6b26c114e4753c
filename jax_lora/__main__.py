"""`python -m jax_lora` is the `jax-lora` command."""

import sys

from jax_lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
