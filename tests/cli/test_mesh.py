"""The option --mesh of train, eval and plan, on eight devices."""

import json

import pytest
import yaml

from jax_lora.cli import main
from tests.cli.test_plan import quick

__all__ = ["quick"]


@pytest.mark.slow
def test_a_run_on_a_mesh_is_evaluated_on_another_and_resumed_on_one_device(
    train, tmp_path, monkeypatch, capsys
):
    options = ("--lr-schedule", "constant", "--warmup", "0", "--batch-size", "8")
    assert train(*options, "--mesh", "fsdp=4,tensor=2") == 0
    config = tmp_path / "adapters" / "config.yaml"
    assert yaml.safe_load(config.read_text())["mesh"] == "fsdp=4,tensor=2"
    scores = {}
    for mesh in ("auto", "fsdp=8"):
        command = ["eval", "--mesh", mesh, "--max-tokens", "2", "--json", f"{mesh}.json"]
        assert main(command) == 0
        scores[mesh] = json.loads((tmp_path / f"{mesh}.json").read_text())["adapter"]["all"]
    assert scores["auto"]["loss"] == pytest.approx(scores["fsdp=8"]["loss"], rel=1e-5)
    assert scores["auto"]["tokens"] == scores["fsdp=8"]["tokens"]
    assert train("--resume", "--mesh", "auto", "--iters", "3") == 0
    assert "2 of 3 steps are done" in capsys.readouterr().out
    assert yaml.safe_load(config.read_text())["mesh"] == "auto"


@pytest.mark.slow
def test_full_fine_tuning_is_sharded(train, tmp_path):
    options = ("--fine-tune-type", "full", "--batch-size", "8", "--mesh", "data=2,fsdp=4")
    assert train(*options) == 0
    assert (tmp_path / "adapters" / "step-000002" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--mesh", "model=8"), "some of data, fsdp, tensor, expert"),
        (("--mesh", "data=2,fsdp=2"), "8, the number of devices here"),
        (("--mesh", "fsdp=8", "--batch-size", "4"), "a multiple of 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_the_model_is_loaded(
    train, tmp_path, capsys, options, says
):
    assert train(*options) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "adapters" / "config.yaml").exists()


@pytest.mark.slow
def test_a_plan_on_a_mesh_has_less_memory_on_each_device(model_folder, tmp_path):
    peaks = []
    for mesh in ("data=8", "fsdp=8"):
        file = tmp_path / "plan.json"
        command = ["plan", str(model_folder), "--batch-size", "8", "--mesh", mesh, "--json"]
        assert main([*command, str(file)]) == 0
        compiled = json.loads(file.read_text())["compiled"]
        assert compiled["devices"] == 8
        peaks.append(compiled["arguments"])
    assert peaks[1] < peaks[0] / 2
