"""Build docs/explorer.html: one file with everything in it, that loads nothing.

    python scripts/build_explorer.py

Its formulas are those of `jax_lora.plan`, translated; its models are the shapes that
`jax_lora.plan.planned_model.plan_shape` reports. What is hand-written lies in scripts/explorer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from explorer.translate import translate

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan import arithmetic, methods
from jax_lora.plan.planned_model import PlannedModel, plan_shape
from jax_lora.plan.planning import Choices, method_of
from jax_lora.plan.published import NAMES

PARTS = Path(__file__).parent / "explorer"
PAGE = Path(__file__).parents[1] / "docs" / "explorer.html"

TARGETS = ("all-linear", "attention", "mlp", "q and v")
# Queries and values by the names of each family; GPT-2 has them in one kernel with the keys.
QUERIES_AND_VALUES = {"gpt2": ("c_attn",), "roberta": ("query", "value")}
USUAL = ("q_proj", "v_proj")


def targets_of(name: str, choice: str) -> Any:
    """Say what a choice of the page is for a model: the `targets` of its configuration."""
    if choice != "q and v":
        return choice
    return QUERIES_AND_VALUES.get(name.split("-")[0], USUAL)


def describe(name: str) -> dict[str, Any]:
    """Write a model down as the page needs it: its shape, and which kernels each choice adapts."""
    model = plan_shape(name, None)
    shape = model.shape
    adapted = {choice: adapted_by(model, name, choice) for choice in TARGETS}
    kernels = [
        {
            "path": kernel.path, "inputs": kernel.inputs, "outputs": kernel.outputs,
            "count": kernel.count, "active": kernel.active, "kind": kernel.kind,
            "is_head": kernel.is_head,
            "targets": [choice for choice in TARGETS if kernel.path in adapted[choice]],
        }
        for kernel in shape.kernels
    ]  # fmt: skip
    return {
        "name": name, "kernels": kernels, "other": shape.other, "width": shape.width,
        "layers": shape.layers, "heads": shape.heads, "groups": shape.groups,
        "head_dim": shape.head_dim, "feed_forward": shape.feed_forward,
        "vocabulary": shape.vocabulary, "wide_norms": shape.wide_norms,
    }  # fmt: skip


def adapted_by(model: PlannedModel, name: str, choice: str) -> set[str]:
    """Find the kernels that the library itself adapts for a choice."""
    settings = TrainSettings(rank=1, targets=targets_of(name, choice))
    return {kernel.path for kernel in method_of(model, Choices(settings)).adapted}


def build() -> str:
    """Put the page together."""
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
            raise SystemExit(f"page.html has {page.count(place)} places for {place}, not 1")
        page = page.replace(place, text)
    return page


if __name__ == "__main__":
    PAGE.write_text(build(), encoding="utf-8")
    print(f"{PAGE}: {PAGE.stat().st_size / 1000:.0f} kB")
