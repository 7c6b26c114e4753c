"""The README's code runs as it is written."""

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


def test_there_is_code_to_run():
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_runs_as_written(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    # A reader's session has JAX's own defaults.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, str(README), "exec"), names)  # noqa: S102 - the repository's own text
    assert float(names["value"]) > 0
    assert names["logits"].shape == (2, 32, 4096)
    assert (tmp_path / "adapter").is_dir()
