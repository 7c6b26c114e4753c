"""A folder with pickled weights is refused with the command that converts them."""

import shlex
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_lora.errors import ModelError
from jax_lora.models.folder import weight_files
from jax_lora.storage.pickled_weights import conversion_command, pickle_names

SHARDS = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]


def command_of(folder):
    with pytest.raises(ModelError, match="only pickle files") as caught:
        weight_files(folder)
    return str(caught.value).rpartition("\n")[2].strip()


def test_the_refusal_names_the_files_and_one_command(tmp_path):
    folder = tmp_path / "it's a model"
    folder.mkdir()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (folder / name).write_bytes(b"never read")
        (folder / name).chmod(0)
    words = shlex.split(command_of(folder))
    assert words[:2] == ["python", "-c"] and "weights_only=True" in words[2]
    target, source = f"{folder}/model.safetensors", f"{folder}/pytorch_model.bin"
    assert words[3:] == [target, source]
    compile(words[2], "command", "exec")


def test_shards_are_converted_together(tmp_path):
    for name in SHARDS:
        (tmp_path / name).touch()
    names = pickle_names(path.name for path in tmp_path.iterdir())
    assert names == SHARDS
    command = conversion_command(tmp_path, names, "model.safetensors")
    assert command.endswith(f"model.safetensors {tmp_path}/pytorch_model-*.bin")


@pytest.mark.slow
def test_the_command_converts_shared_and_transposed_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    weight = torch.arange(12.0).reshape(3, 4)
    parts = ({"a": weight.t(), "tied": weight}, {"b": weight[0]})
    for name, tensors in zip(SHARDS, parts, strict=True):
        torch.save(tensors, tmp_path / name)
    command = command_of(tmp_path).replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True)
    found = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(found["a"], weight.numpy().T)
    assert {name: array.shape for name, array in found.items()} == {
        "a": (4, 3),
        "tied": (3, 4),
        "b": (4,),
    }
    assert list(weight_files(tmp_path)) == ["model.safetensors"]
