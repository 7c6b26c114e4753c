"""A model and data of a few kilobytes for the command, which runs in this process."""

import json

import jax
import pytest

from jax_lora.cli import main
from jax_lora.finetune import devices
from jax_lora.models import Llama, save
from tests.tiny_model import TINY, random_params, write_tokenizer

ROWS = [
    {"prompt": f"how many rows {n}?", "completion": f" count {n}", "seen": n % 2 == 0}
    for n in range(8)
]


@pytest.fixture(autouse=True)
def promotion():
    # Optax raises floats to its integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The mesh "auto" is one of the eight devices, for which a step compiles faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "MOST_CPU_COPIES", 0)
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("model"))
    model = Llama(TINY)
    save(folder, model, random_params(model))
    return folder


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "valid", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def train(model_folder, data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*options, data=data_folder):
        command = ["train", str(model_folder), "--data", str(data), "--iters", "2", "--rank", "2"]
        return main([*command, *options])

    return run
