"""The pages of docs/: their code runs as written, their links lead somewhere."""

import re
from pathlib import Path

import jax
import pytest

from jax_lora.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}
CODE = {
    name: blocks
    for name, text in PAGES.items()
    if (blocks := re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
}


@pytest.mark.parametrize("page", sorted(CODE))
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    # A reader's session has JAX's own defaults.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in CODE[page]:
            exec(compile(block, page, "exec"), names)  # noqa: S102 - the repository's own text


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_to_files_that_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        if "://" not in target:
            assert (ROOT / "docs" / target).exists(), target


def test_every_architecture_is_in_the_table_of_models():
    for family in FAMILIES.values():
        row = f"| `{family.model_type}` | `{'`, `'.join(family.architectures)}`"
        assert row in PAGES["models.md"], row
