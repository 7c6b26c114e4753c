"""The notebooks run with small settings, and their saved outputs are complete."""

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from jax_lora.bundled import data_path, model_path
from jax_lora.models import Llama, save
from tests.tiny_model import TINY, random_params
from tests.xla_flags import for_devices

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
# Inserted after the cell of parameters, so that a run takes seconds instead of half an hour: few
# steps of a model with the bundled tokenizer, four layers and a hidden size of 64.
SMALL = {
    "01_what_is_lora": "D, RANK, STEPS = 512, 4, 20",
    "02_intrinsic_rank": (
        "RANKS, LIMIT, RUNS = [4], ['--limit', '4'], Path({folder!r})\n"
        "STEPS = [{model!r}, '--data', {data!r}, '--iters', '4', '--val-batches', '1']\n"
        "model_path = lambda: Path({model!r})"
    ),
    "03_finetune_and_serve": "MODEL, RANK, STEPS, SERVE_STEPS = Path({model!r}), 4, 6, 3",
    "04_functional_superpowers": (
        "LEARNING_RATES, SEEDS, SWEEP_STEPS = [1e-3, 1e-2], 2, 3\nPRIVATE_STEPS, LANCZOS = 2, 4\n"
        "from pathlib import Path\nmodel_path = lambda: Path({model!r})"
    ),
}
# Move the sliders; every change redraws the figure.
MOVE_THE_SLIDER = """
for d, rank in ((100, 1), (100, 100), (7, 3)):
    d_box.value = d
    rank_slider.value = rank
    assert (rank_slider.max, rank_slider.value) == (d, rank)
rank_slider.value = 7
d_box.value = 5
assert rank_slider.value == 5
"""


@pytest.fixture(scope="module")
def runner():
    path = ROOT / "scripts" / "run_notebooks.py"
    spec = importlib.util.spec_from_file_location("run_notebooks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, folder)
    config = dataclasses.replace(
        TINY,
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=1,
    )
    llama = Llama(config)
    save(folder, llama, random_params(llama))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(runner, name, small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", for_devices(1))  # as on a typical machine
    # The commands that a notebook runs share a compilation cache.
    monkeypatch.delenv("JAX_LORA_NO_CACHE", raising=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    if name == "01_what_is_lora":
        notebook.cells.append(nbformat.v4.new_code_cell(MOVE_THE_SLIDER))
    small = SMALL[name].format(folder=str(tmp_path), model=str(small_model), data=str(data_path()))
    done = runner.execute(notebook, NOTEBOOKS[name].parent, small, timeout=600)
    said = [json.dumps(output) for cell in done.cells for output in cell.get("outputs", [])]
    assert not [text for text in said if "Warning" in text]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_outputs_are_those_of_one_run(name):
    cells = [c for c in nbformat.read(NOTEBOOKS[name], as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_links_lead_to_existing_files(name):
    for cell in nbformat.read(NOTEBOOKS[name], as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
                assert "://" in target or (NOTEBOOKS[name].parent / target).exists(), target


def test_every_notebook_has_small_settings():
    assert set(SMALL) == set(NOTEBOOKS)
