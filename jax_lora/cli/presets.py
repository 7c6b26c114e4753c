"""Settings of other tools, for comparison, and those that suit the bundled model."""

from __future__ import annotations

from typing import Any

# A model of four million parameters trains fastest at a learning rate at which large models
# diverge.
OF_BUNDLED: dict[str, Any] = {
    "rank": 32,
    "alpha": 32.0,
    "learning_rate": 5e-3,
    "batch_size": 16,
    "epochs": 4.0,
    "warmup": 0.05,
    "steps_per_eval": 100,
    "save_every": 200,
}
PRESETS: dict[str, dict[str, Any]] = {
    # The `lora` command of mlx-lm: Adam without weight decay or clipping, a constant learning rate,
    # the last 16 layers, a scale instead of alpha / rank, and prompts in the loss.
    "mlx": {
        "rank": 8,
        "scale": 20.0,
        "num_layers": 16,
        "batch_size": 4,
        "iters": 1000,
        "max_seq_length": 2048,
        "mask_prompt": False,
        "optimizer": "adam",
        "learning_rate": 1e-5,
        "lr_schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "val_batches": 25,
        "steps_per_report": 10,
        "steps_per_eval": 200,
        "save_every": 100,
    },
}
