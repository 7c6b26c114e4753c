"""The GPT-3 175B figures of the LoRA paper, computed from the shapes of the model.

Reference:
    Hu et al., LoRA (arXiv:2106.09685), section 4.2: training memory falls from 1.2 TB to 350 GB,
    and the checkpoint from 350 GB to 35 MB (about 10,000 times smaller), at r = 4 on queries and
    values.
"""

from __future__ import annotations

from jax_lora.plan.arithmetic import (
    ModelShape,
    adapter_size,
    optimizer_bytes,
    pair_size,
    reduction,
    weight_bytes,
)
from jax_lora.plan.units import show_bytes

NOMINAL = 175 * 10**9  # parameters by the model's name; its shapes have slightly fewer
HALF = 2  # bytes of a 16-bit element


def checkpoint_size(shape: ModelShape) -> int:
    """Count the parameters of the paper's adapter for GPT-3: r = 4 on queries and values."""
    return adapter_size((k for k in shape.kernels if "q_proj" in k.path or "v_proj" in k.path), 4)


def full_training_bytes(shape: ModelShape) -> int:
    """Compute the least memory that Adam needs: weights, gradients and state in 16 bits."""
    return 2 * shape.size * HALF + optimizer_bytes(shape.size, HALF)


def paper_lines(shape: ModelShape) -> list[str]:
    """Compare the figures from the shapes of GPT-3 with those of the paper, in 80 columns."""
    size, half = checkpoint_size(shape), weight_bytes(shape, HALF)
    square = f"{pair_size(4096, 4096, 8):,} of {4096**2:,}, {reduction(4096, 4096, 8):.2%} fewer"
    rows = [
        ("4096 x 4096 at r = 8", square, ""),
        ("r = 4 on q and v", f"{size:,} parameters", "18 M"),
        ("  in 16 bits", f"{size * HALF / 2**20:.1f} MiB", "35 MB"),
        ("weights in 16 bits", show_bytes(half), "350 GB"),
        ("  of 175 G parameters", show_bytes(NOMINAL * HALF), "350 GB"),
        ("  times the adapter", f"{half / (size * HALF):,.0f}", "10,000"),
        ("Adam, all in 16 bits", show_bytes(full_training_bytes(shape)), "1.2 TB"),
    ]
    return [
        "Figures of the LoRA paper, from these shapes                     paper reports",
        *(f"  {name:<22}{value:<38}{reported:>13}".rstrip() for name, value, reported in rows),
        'Training a 175B model with LoRA "in 35 GB" is impossible: its 16-bit weights',
        f"alone take {show_bytes(half)}, and {show_bytes(weight_bytes(shape, HALF, 'nf4'))} in NF4."
        " The paper's 35 MB is the size of the",
        "checkpoint; training memory fell from 1.2 TB to 350 GB.",
    ]
