"""The LoRA paper's numbers for GPT-3 175B, from the formulas, and what they rule out.

Reference:
    Hu et al., LoRA (arXiv:2106.09685), section 4.2: training memory from 1.2 TB to 350 GB, and the
    checkpoint from 350 GB to 35 MB, about 10,000 times smaller, at r = 4 on queries and values.
"""

from __future__ import annotations

from jax_lora.plan.arithmetic import (
    ModelShape,
    adapter_size,
    fewer,
    moment_bytes,
    pair_size,
    weight_bytes,
)
from jax_lora.plan.units import show_bytes

RANK = 4
NAMES = ("q_proj", "v_proj")
NOMINAL = 175 * 10**9  # what the model is called after; its shapes have a little less
HALF = 2  # bytes


def checkpoint_size(shape: ModelShape) -> int:
    """Count the numbers of the paper's adapter.

    Args:
      shape: GPT-3's.

    Returns:
      Numbers of the factors at r = 4 on queries and values.
    """
    return adapter_size((k for k in shape.kernels if k.path.split("/")[-2] in NAMES), RANK)


def full_training_bytes(shape: ModelShape) -> int:
    """Weights, gradients and two moments in 16 bits each: the least that Adam can do with."""
    return 2 * shape.size * HALF + moment_bytes(shape.size, HALF)


def paper_lines(shape: ModelShape) -> list[tuple[str, str, str]]:
    """Work out the paper's numbers.

    Args:
      shape: GPT-3's.

    Returns:
      For each: what it is, what the formulas say, and what the paper says.
    """
    numbers = checkpoint_size(shape)
    return [
        (
            "4096 x 4096 at r = 8",
            f"{pair_size(4096, 4096, 8):,} of {4096**2:,}, {fewer(4096, 4096, 8):.2%} fewer",
            "",
        ),
        ("r = 4 on q and v", f"{numbers:,} numbers", "18 M"),
        ("  in 16 bits", f"{numbers * HALF / 2**20:.1f} MiB", "35 MB"),
        ("weights in 16 bits", show_bytes(weight_bytes(shape, HALF)), "350 GB"),
        ("  of 175 G numbers", show_bytes(NOMINAL * HALF), "350 GB"),
        ("  times the adapter", f"{weight_bytes(shape, HALF) / (numbers * HALF):,.0f}", "10,000"),
        ("Adam, all in 16 bits", show_bytes(full_training_bytes(shape)), "1.2 TB"),
    ]


def impossible(shape: ModelShape) -> list[str]:
    """Say which popular number cannot be right, and what it was taken from."""
    half = show_bytes(weight_bytes(shape, HALF))
    nf4 = show_bytes(weight_bytes(shape, HALF, "nf4"))
    return [
        'A 175B model trained with LoRA "in 35 GB" cannot be right: its 16-bit weights',
        f"alone are {half}, and {nf4} in NF4. 35 MB is the size of the checkpoint;",
        "the memory of training fell from 1.2 TB to 350 GB.",
    ]
