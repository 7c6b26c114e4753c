"""Out of memory: what took it, and which flags shrink it."""

from __future__ import annotations

import jax

from jax_lora.errors import format_error

SHOWN = 5


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device or the machine has no more memory.

    Args:
      error: Any error.

    Returns:
      True for JAX's own error of that kind, and for Python's.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory_message(error: BaseException) -> str:
    """Say what is in memory, and what to change.

    Args:
      error: The error.

    Returns:
      The message: the largest arrays that the program holds, and the flags.
    """
    held = sorted(jax.live_arrays(), key=lambda array: -array.nbytes)
    total = sum(array.nbytes for array in held)
    first = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    lines = [first, f"held so far: {total / 1e9:.2f} GB in {len(held)} arrays, the largest:"]
    lines += [f"{a.dtype} {a.shape}, {a.nbytes / 1e9:.3f} GB" for a in held[:SHOWN]]
    return format_error(
        "out of memory",
        got="\n    ".join(lines),
        expected="arrays that fit",
        fix="In this order: --batch-size 1 with --grad-accumulation-steps for the rest, "
        "--grad-checkpoint, a smaller --max-seq-length, --loss-chunk 128, --dtype bfloat16, "
        "a smaller --rank.",
    )
