"""The pages of docs/: their code runs, their commands parse, their links lead somewhere."""

import doctest
import re
import shlex
from pathlib import Path

import jax
import pytest

from jax_lora.cli.main import make_parser
from jax_lora.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"]
PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in FILES}
CODE = {
    name: blocks
    for name, text in PAGES.items()
    if name.startswith("docs/")
    and (blocks := re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
}
COMMANDS = [
    (name, line.split(" #")[0].strip())
    for name, text in PAGES.items()
    for line in re.findall(r"^    (?:\$ )?(jax-lora [a-z].*)$", text.replace("\\\n", " "), re.M)
]
TARGETS = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


# Pages whose code takes long to compile.
LONG = (
    "docs/coming_from.md",
    "docs/meshes.md",
    "docs/models.md",
    "docs/symptoms.md",
    "docs/training_loop.md",
)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in LONG)) for page in sorted(CODE)]
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    # A reader's session has JAX's own defaults.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in CODE[page]:
            if block.startswith(">>>"):
                names = _prints_what_it_says(block, names, page)
            else:
                exec(compile(block, page, "exec"), names)  # noqa: S102 - the repository's own text


def _prints_what_it_says(block, names, page):
    example = doctest.DocTestParser().get_doctest(block, names, page, page, 0)
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    said: list[str] = []
    results = runner.run(example, out=said.append, clear_globs=False)
    assert results.failed == 0, "".join(said)
    return example.globs


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_to_files_that_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", sorted(PAGES))
def test_files_of_the_repository_that_are_named_exist(page):
    folders = "jax_lora|tests|benchmarks|scripts|examples|notebooks|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", PAGES[page]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_into_a_page_lead_to_one_of_its_headings(page):
    for target, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", PAGES[page]):
        where = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        headings = re.findall(r"^#+ (.*)$", where.read_text(encoding="utf-8"), re.M)
        assert heading in {_anchor(each) for each in headings}, heading


def _anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[command for _, command in COMMANDS])
def test_commands_are_understood(page, command):
    words = [word for word in shlex.split(command)[1:] if word != "..."]
    make_parser().parse_args(words)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_make_has_the_targets_that_a_page_names(page):
    named = re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", PAGES[page], re.M)
    assert set(named) <= set(TARGETS)


def test_every_architecture_is_in_the_table_of_models():
    for family in FAMILIES.values():
        row = f"| `{family.model_type}` | `{'`, `'.join(family.architectures)}`"
        assert row in PAGES["docs/models.md"], row


def test_the_summary_of_a_training_step_has_the_numbers_of_its_tables():
    tables = dict(_tables(PAGES["docs/benchmark_tables.md"]))
    summary = PAGES["docs/performance.md"].split("| OPTIONS |")[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in summary.split("\n")]
    assert len(lines) == 2 + 7
    for _, step, full, by_hand, accessed, temp, options in lines[2:]:
        table = tables[options.strip("`")]
        ours, hand = table["jax_lora (auto)"], table["hand-written LoRA"]
        assert [step, full, by_hand] == [ours[key] for key in ("step s", "/full", "/hand-written")]
        assert accessed == f"{hand['GB accessed']} → {ours['GB accessed']}"
        rows = (table["full fine-tuning"], hand, ours)
        assert temp == ", ".join(row["temp MB"] for row in rows)


def _tables(text):
    """Read the tables of benchmarks.train_step: cells by row and column, by the options."""
    for section in text.split("python -m benchmarks.train_step")[1:]:
        lines = re.findall(r"^\|(.*)\|$", section.split("<!--")[0], re.M)
        cells = [[cell.strip() for cell in line.split("|")] for line in lines]
        rows = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
        yield section.split("--rounds")[0].strip(), rows
