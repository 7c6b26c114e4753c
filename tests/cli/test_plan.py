"""`jax-lora plan` from the command line."""

import json
import shutil

import pytest

from jax_lora.cli import main, plan
from jax_lora.plan import planning
from jax_lora.plan.compiled_step import StepMemory


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("JAX_LORA_NO_CACHE", "1")
    monkeypatch.setattr(plan, "matmul_rate", lambda dtype: 1e12)


def numbers(tmp_path, *options):
    file = tmp_path / "plan.json"
    assert main(["plan", *map(str, options), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_a_folder_is_planned_with_its_data_and_compiled(
    model_folder, data_folder, tmp_path, capsys
):
    found = numbers(tmp_path, model_folder, "--data", data_folder, "--rank", "2", "--fit", "1GB")
    out = capsys.readouterr().out
    assert "The training step of this run, compiled for its largest batch" in out
    assert "fits into 1 GB (5% is left free)." in out
    assert max(map(len, out.splitlines())) <= 80
    assert "peak memory of the process" in out
    assert found["compiled"]["peak"] > found["parameters"] * 4
    assert found["process"] > 100e6  # Python and JAX alone
    assert (found["steps"], found["data"]["examples"]) == (2, 8)
    assert found["fit"]["fits"] and found["not_compiled"] is None


def test_config_json_alone_is_enough(model_folder, data_folder, tmp_path):
    shutil.copy(model_folder / "config.json", tmp_path)
    options = ("--data", data_folder, "--no-compile", "--batch-size", "2")
    found = numbers(tmp_path, tmp_path, *options)
    assert found["data"]["note"].startswith("no tokenizer found")
    assert found["steps"] == 4


def test_without_arguments_the_plan_is_that_of_train(tmp_path):
    found = numbers(tmp_path, "--no-compile")
    assert (found["model"], found["trainable"], found["steps"]) == ("bundled", 749_568, 508)
    assert found["methods"]["LoRA"]["trainable"] == found["trainable"]


def test_gpt3_prints_the_figures_of_the_paper(capsys):
    command = ["plan", "--shape", "gpt3-175b", "--rank", "4", "--targets", "q_proj,v_proj"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "rank 4, 192 adapted kernels, 18,874,368 parameters" in out
    assert "36.0 MiB" in out and "99.61%" in out and "is impossible" in out
    assert max(map(len, out.splitlines())) <= 80


def test_fit_shows_the_command_to_run(capsys, data_folder):
    command = ["plan", "--shape", "llama-3-8b", "--batch-size", "8", "--data", str(data_folder)]
    assert main([*command, "--targets", "q_proj,v_proj", "--rank", "8", "--fit", "24GB"]) == 0
    typed = capsys.readouterr().out.split("Run:\n")[1]
    assert " ".join(typed.replace("\\", "").split()) == (
        f"jax-lora train MODEL --data {data_folder} --rank 8 --targets q_proj,v_proj"
        " --batch-size 2 --grad-accumulation-steps 4 --remat full"
    )


def test_a_suggestion_that_fails_when_compiled_is_followed_by_another(
    model_folder, data_folder, tmp_path, monkeypatch
):
    asked = []

    def step_memory(model, settings, **options):
        asked.append(settings.batch_size)
        # XLA reports ten times the memory of the formula unless the batch size is 1.
        return StepMemory(0, 0, 0, 10**6 if settings.batch_size > 1 else 10**4, 1, 0.0)

    monkeypatch.setattr(planning, "step_memory", step_memory)
    monkeypatch.setattr(plan, "step_memory", step_memory)
    options = (model_folder, "--data", data_folder, "--batch-size", "4", "--rank", "2")
    found = numbers(tmp_path, *options, "--fit", "1.04MB")["fit"]
    assert asked == [4, 2, 1]
    assert found["changes"] == ["--batch-size 1 --grad-accumulation-steps 4"]
    assert found["fits"]


def test_flags_change_the_numbers(tmp_path):
    shape = ("--shape", "gpt2", "--no-compile", "--batch-size", "2")
    plain = numbers(tmp_path, *shape)
    smaller = ("--grad-checkpoint", "--optimizer", "sgd", "--max-seq-length", "128", "--rank", "4")
    less = numbers(tmp_path, *shape, *smaller)["own"]
    for name in ("activations", "optimizer_state", "logits", "adapter"):
        assert less[name] < plain["own"][name], name
    full = numbers(tmp_path, *shape, "--fine-tune-type", "full", "--dtype", "float32")["own"]
    assert full["trainable"] == plain["parameters"]
    assert full["weights"] == 2 * plain["own"]["weights"]


@pytest.mark.parametrize("asked", [(), ("--max-seq-length", "64"), ("--max-seq-length", "4096")])
def test_the_length_that_was_asked_for_is_planned_without_data(model_folder, asked, capsys):
    assert main(["plan", str(model_folder), "--no-compile", "--batch-size", "3", *asked]) == 0
    out = " ".join(capsys.readouterr().out.split())
    length = int(asked[1]) if asked else 128  # the positions of the model
    assert f"Batch 3 rows of {length} tokens" in out
    assert f"every example counts as {length} tokens" in out
    assert ("truncates them at the 128 positions" in out) == (length > 128)


def test_plan_accepts_the_configuration_file_of_train(tmp_path):
    (tmp_path / "lora.yaml").write_text("rank: 4\nbatch_size: 2\niters: 5\n")
    options = ("--shape", "gpt2", "--no-compile", "-c", tmp_path / "lora.yaml")
    found = numbers(tmp_path, *options)
    assert found["steps"] == 5
    assert found["trainable"] == numbers(tmp_path, *options[:3], "--rank", "4")["trainable"]


def test_json_can_replace_the_tables(capsys):
    assert main(["plan", "--shape", "gpt2", "--no-compile", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 124_439_808


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fit", "40x"), "--fit\n  got:      '40x'"),
        (("--shape", "no-such"), "--shape no-such\n  got:      neither a known name"),
        (("model", "--shape", "gpt2"), "--shape gpt2\n  got:      also the model model"),
        (("no/such/folder",), "no/such/folder"),
        (("--shape", "gpt2", "--targets", "q_proj"), "targets='q_proj'"),
        (("--shape", "gpt2", "--rank", "0"), "rank"),
    ],
)
def test_bad_input_is_one_message(options, message, capsys):
    assert main(["plan", *options]) == 2
    assert message in capsys.readouterr().err
