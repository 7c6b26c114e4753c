"""The message for out-of-memory errors: the largest arrays, and the flags that save memory."""

from __future__ import annotations

import jax

from jax_lora.errors import format_error

_SHOWN_ARRAYS = 5


def out_of_memory_message(error: BaseException) -> str:
    """Describe an out-of-memory error, with the largest live arrays and flags that save memory."""
    arrays = sorted(jax.live_arrays(), key=lambda array: -array.nbytes)
    total = sum(array.nbytes for array in arrays)
    first = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    lines = [first, f"{total / 1e9:.2f} GB in {len(arrays)} live arrays, the largest:"]
    lines += [f"{a.dtype} {a.shape}, {a.nbytes / 1e9:.3f} GB" for a in arrays[:_SHOWN_ARRAYS]]
    return format_error(
        "out of memory",
        got="\n    ".join(lines),
        expected="arrays that fit into memory",
        fix="Try, in this order: --batch-size 1 with more --grad-accumulation-steps, "
        "--grad-checkpoint, a smaller --max-seq-length, --loss-chunk 128, --dtype bfloat16, "
        "a smaller --rank.",
    )
