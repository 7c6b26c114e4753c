"""The fixtures are what their scripts make with PyTorch today: same weights, same logits.

Runs where torch and transformers are installed beside the package.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent.parent
TOKENIZERS = "vocabularies"
SCRIPTS = {script.stem for script in (TESTS / "make_fixtures").glob("*.py")} - {TOKENIZERS}


def remake(script: str, folder: Path) -> list[Path]:
    """Run a copy of the script, which reads and writes beside the copy, and list what it made."""
    for name in ("make_fixtures", "fixtures"):
        shutil.copytree(TESTS / name, folder / name)
    written = {file: file.stat().st_mtime_ns for file in (folder / "fixtures").rglob("*")}
    subprocess.run([sys.executable, folder / "make_fixtures" / f"{script}.py"], check=True)
    found = sorted((folder / "fixtures").rglob("*.safetensors"))
    return [file for file in found if file.stat().st_mtime_ns != written.get(file)]


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_make_the_fixtures_again(script, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    made = remake(script, tmp_path)
    assert made
    for file in made:
        stored = load_file(TESTS / file.relative_to(tmp_path))
        again = load_file(file)
        assert stored.keys() == again.keys()
        for name, tensor in stored.items():
            np.testing.assert_allclose(again[name], tensor, atol=1e-5, err_msg=f"{file}: {name}")


def test_the_ids_of_texts_are_those_of_the_libraries_of_today(tmp_path):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("transformers")
    remake(TOKENIZERS, tmp_path)
    written = "fixtures/tokenizers/expected.json"
    stored, again = (json.loads((top / written).read_text()) for top in (TESTS, tmp_path))
    assert again == stored
