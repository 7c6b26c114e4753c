"""Quantize a matrix with bitsandbytes, which needs torch: `python tests/make_fixtures/nf4.py`."""

from pathlib import Path

import bitsandbytes.functional as quantization
import numpy as np
import torch

torch.manual_seed(0)
w = torch.randn(48, 128) * 0.05  # (out, in)
codes, state = quantization.quantize_4bit(
    w, quant_type="nf4", compress_statistics=True, blocksize=64
)
np.savez(
    Path(__file__).parents[1] / "fixtures" / "nf4" / "reference.npz",
    w=w.numpy(),
    codes=codes.numpy().reshape(48, -1),
    scales=state.absmax.numpy(),
    spans=state.state2.absmax.numpy(),
    offset=state.offset.numpy(),
    table=state.state2.code.numpy(),
    values=quantization.dequantize_4bit(codes, state).numpy(),
)
