"""A path that no file system accepts is an error of this library, wherever a caller gives it."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.data.data_folder import read_data
from jax_lora.data.rows import read_rows
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import LoraError
from jax_lora.finetune.run_folder import claimed
from jax_lora.finetune.training_state import find_resumable
from jax_lora.models import Llama
from jax_lora.plan.planned_model import plan_folder
from jax_lora.report.metrics import read_metrics
from tests.tiny_model import TINY, random_params

TREE = {"kernel": np.ones((4, 4), np.float32)}
NAMES = {"kernel": "kernel"}


@pytest.fixture(scope="module")
def uses():
    llama = Llama(TINY)
    params = random_params(llama)
    adapter = jl.lora_init(jax.random.key(0), TREE, jl.LoraConfig(rank=2))

    def claim(path):
        with claimed(path):
            pass

    return {
        "load_adapter": lambda path: jl.load_adapter(path, base=TREE),
        "save_adapter": lambda path: jl.save_adapter(path, adapter, base=TREE),
        "peft.load": lambda path: jl.peft.load(path, TREE, names=NAMES),
        "peft.save": lambda path: jl.peft.save(path, adapter, names=NAMES),
        "models.load": jl.models.load,
        "models.save": lambda path: jl.models.save(path, llama, params),
        "read_data": read_data,
        "read_rows": read_rows,
        "Tokenizer.load": Tokenizer.load,
        "claimed": claim,
        "find_resumable": find_resumable,
        "plan_folder": lambda path: plan_folder(path, None),
        "read_metrics": read_metrics,
    }


@pytest.mark.parametrize(
    "path", ["n" * 300, "x/" * 3000, "a\0b", "a\ud800"], ids=["name", "depth", "null", "surrogate"]
)
def test_it_is_our_own_error(uses, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, use in uses.items():
        for given in (path, Path(path)):
            with pytest.raises(LoraError) as info:
                use(given)
            assert "expected: a path that the file system accepts" in str(info.value), name
    assert not any(tmp_path.iterdir())
