"""A size in config.json that the tensors do not have is refused before anything is built."""

import json
import time

import pytest

import jax_lora as jl
from jax_lora.errors import ModelError
from jax_lora.models import Llama
from jax_lora.models.read_config import read_config
from jax_lora.storage.limits import limit_hint
from tests.tiny_model import TINY, random_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = Llama(TINY)
    jl.models.save(folder, model, random_params(model))
    return folder


def change(source, target, **changes):
    raw = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | changes))
    if not (target / "model.safetensors").exists():
        (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: expected an integer"),
        ({"num_hidden_layers": 9999}, "num_hidden_layers = 9999, but the files have"),
        ({"hidden_size": 2**40}, "hidden_size = 1099511627776: expected an integer"),
        ({"hidden_size": 2**30}, "hidden_size = 1073741824, but no axis of a tensor is longer"),
        ({"vocab_size": 2**31 - 1}, "vocab_size = 2147483647, but no axis"),
        ({"intermediate_size": 10**9}, "intermediate_size = 1000000000, but no axis"),
        ({"head_dim": 2**16}, "head_dim = 65536, but no axis"),
        ({"head_dim": 2**30}, "head_dim"),
    ],
)
def test_a_size_that_the_tensors_do_not_have_is_refused_at_once(folder, tmp_path, changes, message):
    change(folder, tmp_path, **changes)
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        jl.models.load(tmp_path)
    assert message in str(caught.value) and time.monotonic() - start < 1


def test_the_limit_on_layers_can_be_raised(folder, tmp_path, monkeypatch):
    change(folder, tmp_path, num_hidden_layers=20_000)
    with pytest.raises(ModelError) as caught:
        read_config(tmp_path)
    assert str(caught.value).endswith(limit_hint("layers"))
    monkeypatch.setenv("JAX_LORA_LIMITS", "layers=20000")
    assert read_config(tmp_path).num_hidden_layers == 20_000


WRONG = [None, True, "x", "", [], [[1]], {}, {"a": 1}, [None], -1, 0, 2**63, 10**400, 1.5]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:10])
def test_a_value_of_another_type_is_a_model_error(folder, tmp_path, value):
    raw = json.loads((folder / "config.json").read_text())
    for name in [*raw, "layer_types", "rope_scaling", "head_dim", "id2label", "num_experts"]:
        (tmp_path / "config.json").write_text(json.dumps(raw | {name: value}))
        try:
            read_config(tmp_path)
        except ModelError as error:
            assert "config.json" in str(error)
