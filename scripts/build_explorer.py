"""Build docs/explorer.html, a single file without dependencies.

    python scripts/build_explorer.py

The formulas are translated from `jax_lora.plan`; the models are the shapes that
`jax_lora.plan.planned_model.plan_shape` returns. scripts/explorer holds the hand-written parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from explorer.translate import translate

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan import arithmetic, methods
from jax_lora.plan.planned_model import PlannedModel, plan_shape
from jax_lora.plan.planning import method_of
from jax_lora.plan.published import NAMES

PARTS = Path(__file__).parent / "explorer"
PAGE = Path(__file__).parents[1] / "docs" / "explorer.html"

TARGETS = ("all-linear", "attention", "mlp", "q and v")
# Names of the query and value kernels by family; GPT-2 has one kernel for queries, keys and values.
QUERIES_AND_VALUES = {"gpt2": ("c_attn",), "roberta": ("query", "value")}
USUAL = ("q_proj", "v_proj")


def targets_of(name: str, choice: str) -> Any:
    """Return the `targets` of a model that a choice on the page stands for."""
    if choice != "q and v":
        return choice
    return QUERIES_AND_VALUES.get(name.split("-")[0], USUAL)


def describe(name: str) -> dict[str, Any]:
    """Return the shape of a model as JSON values, with the kernels that each choice adapts."""
    model = plan_shape(name, None)
    shape = model.shape
    adapted = {choice: adapted_by(model, name, choice) for choice in TARGETS}
    kernels = [
        {
            "path": kernel.path, "inputs": kernel.inputs, "outputs": kernel.outputs,
            "count": kernel.count, "active": kernel.active, "kind": kernel.kind,
            "is_head": kernel.is_head, "is_router": kernel.is_router,
            "targets": [choice for choice in TARGETS if kernel.path in adapted[choice]],
        }
        for kernel in shape.kernels
    ]  # fmt: skip
    return {
        "name": name, "kernels": kernels, "other": shape.other, "hidden_size": shape.hidden_size,
        "num_layers": shape.num_layers, "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size, "vocab_size": shape.vocab_size,
        "float32_norms": shape.float32_norms,
    }  # fmt: skip


def adapted_by(model: PlannedModel, name: str, choice: str) -> set[str]:
    """Return the paths of the kernels that the library adapts for a choice."""
    settings = TrainSettings(rank=1, targets=targets_of(name, choice))
    return {kernel.path for kernel in method_of(model, settings).adapted}


def build() -> str:
    """Return the text of the page."""
    formulas = translate(arithmetic) + "\n\n" + translate(methods, leave_out=("as_dict",))
    models = json.dumps([describe(name) for name in NAMES], separators=(",", ":"))
    page = (PARTS / "page.html").read_text(encoding="utf-8")
    for place, text in {
        "/* style */": (PARTS / "style.css").read_text(encoding="utf-8"),
        "/* formulas */": formulas,
        "/* models */": f"const MODELS = {models};\nconst TARGETS = {json.dumps(TARGETS)};",
        "/* page */": (PARTS / "page.js").read_text(encoding="utf-8"),
    }.items():
        if page.count(place) != 1:
            raise SystemExit(f"page.html contains {place} {page.count(place)} times, expected once")
        page = page.replace(place, text)
    return page


if __name__ == "__main__":
    PAGE.write_text(build(), encoding="utf-8")
    print(f"{PAGE}: {PAGE.stat().st_size / 1000:.0f} kB")
