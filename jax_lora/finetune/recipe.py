"""The settings that suit the model in the package: tiny, and quickest with large steps.

A model of four million parameters takes a learning rate that would wreck a large one.
"""

from __future__ import annotations

from typing import Any

BUNDLED: dict[str, Any] = {
    "rank": 32,
    "alpha": 32.0,
    "learning_rate": 5e-3,
    "batch_size": 16,
    "epochs": 4.0,
    "warmup": 0.05,
    "steps_per_eval": 100,
    "save_every": 200,
}
