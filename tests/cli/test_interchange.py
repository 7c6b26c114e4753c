"""export, import and fuse: adapters in the formats of other tools."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_lora as jl
from jax_lora.bundled import model_path
from jax_lora.cli import main
from jax_lora.cli.adapters import LoadedAdapter
from jax_lora.cli.base_model import load_base
from jax_lora.cli.fuse import adapted_logits, logit_difference
from jax_lora.models import Llama
from tests.file_limits import largest_file
from tests.tiny_model import TINY, random_params

pytestmark = pytest.mark.slow  # each trains, writes, reads and answers


@pytest.fixture(scope="module")
def run_folder(model_folder, data_folder, tmp_path_factory):
    """A run of a few steps, large enough that the adapter matters."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = ["--iters", "4", "--rank", "2", "--learning-rate", "0.05", "--warmup", "0"]
    places = ["--data", str(data_folder), "--adapter-path", str(folder), "--progress", "none"]
    with jax.numpy_dtype_promotion("standard"):
        assert main(["train", str(model_folder), *places, *options]) == 0
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ok(*command):
    assert main([str(word) for word in command]) == 0


def refused(capsys, *command):
    assert main([str(word) for word in command]) == 2
    return capsys.readouterr().err


def load_both(model_folder, run_folder):
    model, params = jl.models.load(model_folder, dtype=jnp.float32)
    checkpoint = next(run_folder.glob("step-*"))
    return model, {"params": params}, jl.load_adapter(checkpoint, base={"params": params})


def test_an_adapter_survives_a_round_trip_through_every_format(
    run_folder, model_folder, data_folder, capsys
):
    def answers(run):
        capsys.readouterr()
        ok("generate", "--adapter-path", run, "--prompt", "how many", "--max-tokens", 8)
        answer = capsys.readouterr().out.rpartition("\n[")[0]
        ok("eval", "--adapter-path", run, "--data", data_folder, "--max-tokens", 4, "--limit", 4)
        lines = capsys.readouterr().out.splitlines()
        table = next(number for number, line in enumerate(lines) if "perplexity" in line)
        return answer, lines[table:-1]  # below the paths, above the time

    expected = answers(run_folder)
    for kind in ("peft", "mlx", "orbax"):
        ok("export", "--adapter-path", run_folder, "--to", kind, kind)
        ok("import", kind, "--model", model_folder, "--adapter-path", f"from-{kind}")
        assert answers(f"from-{kind}") == expected
    ok("export", "--adapter-path", "from-peft", "--to", "peft", "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert Path("again", name).read_bytes() == Path("peft", name).read_bytes()


def test_an_export_names_the_base_model_and_can_target_vllm(run_folder, model_folder, tmp_path):
    ok("export", "--adapter-path", run_folder, "--to", "peft", "served", "--for", "vllm")
    config = json.loads((tmp_path / "served/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    assert config["lora_alpha"] == config["r"] == 2, "vLLM gets the scale inside B"
    ok("export", "--adapter-path", run_folder, "named", "--base-model", "some/model")
    config = json.loads((tmp_path / "named/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"


def test_an_export_for_llama_cpp_and_a_fused_folder_print_the_commands_for_it(
    run_folder, model_folder, tmp_path, capsys
):
    ok("export", "--adapter-path", run_folder, "--to", "gguf", "served")
    assert [file.name for file in (tmp_path / "served").iterdir()] == ["adapter.gguf"]
    gguf = f"{model_folder.name}.gguf"
    convert = "python llama.cpp/convert_hf_to_gguf.py"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"For llama.cpp, convert {model_folder}: {convert} {model_folder} --outfile {gguf}",
        f"Then run it with the adapter: llama-cli -m {gguf} --lora served/adapter.gguf",
    ]
    ok("fuse", "--adapter-path", run_folder)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"{convert} fused_model --outfile fused_model.gguf")


def test_an_import_creates_a_run_and_moves_an_earlier_run(
    run_folder, model_folder, tmp_path, capsys
):
    ok("export", "--adapter-path", run_folder, "served")
    ok("import", "served", "--model", model_folder)
    config = (tmp_path / "adapters/config.yaml").read_text()
    assert (
        f"model: {model_folder}\n" in config and "# Imported from the adapter in served." in config
    )
    ok("import", "served", "--model", model_folder)
    assert "is now in adapters.1" in capsys.readouterr().out


def test_an_import_that_fails_leaves_no_run(run_folder, model_folder, tmp_path, capsys):
    ok("export", "--adapter-path", run_folder, "--to", "peft", tmp_path / "peft")
    with largest_file(1500):
        command = ("import", tmp_path / "peft", "--model", model_folder, "--adapter-path", "new")
        assert "File too large" in refused(capsys, *command)
    assert not (tmp_path / "new").exists()


def test_a_fused_folder_equals_base_and_adapter(run_folder, model_folder, tmp_path, capsys):
    ok("fuse", "--adapter-path", run_folder, "--save-path", "fused", "--check")
    report = capsys.readouterr().out.splitlines()[-1]
    difference, largest = (float(part.split()[-1]) for part in report.split(","))
    assert difference < 1e-4 < largest
    for file in model_folder.glob("tokenizer*"):
        assert (tmp_path / "fused" / file.name).read_bytes() == file.read_bytes()
    _, variables, adapter = load_both(model_folder, run_folder)
    merged = jl.merge(variables, adapter)["params"]
    _, params = jl.models.load("fused")
    jax.tree.map(np.testing.assert_array_equal, params, merged)
    asked = ("--prompt", "how many", "--max-tokens", 8, "--stop-at-newline")
    ok("generate", "fused", *asked)
    ok("generate", "--adapter-path", run_folder, *asked)
    fused, beside = (
        line for line in capsys.readouterr().out.splitlines() if "tokens, " not in line
    )
    assert fused == beside


def test_the_check_detects_a_folder_that_differs_from_base_and_adapter(run_folder, model_folder):
    _, _, adapter = load_both(model_folder, run_folder)
    trained = LoadedAdapter(load_base(str(model_folder)), adapter, run_folder)
    difference, _ = logit_difference(adapted_logits(trained), model_folder)
    assert difference > 0.01


def test_a_fused_folder_can_have_a_smaller_dtype(run_folder, tmp_path):
    ok("fuse", "--adapter-path", run_folder, "--save-path", "fused", "--dtype", "bfloat16")
    dtypes = {str(t.dtype) for t in load_file(tmp_path / "fused/model.safetensors").values()}
    assert dtypes == {"bfloat16"}


def test_fuse_never_overwrites_other_files(run_folder, model_folder, tmp_path, capsys):
    command = ["fuse", "--adapter-path", run_folder, "--save-path"]
    assert "a folder that is not empty" in refused(capsys, *command, model_folder)
    error = refused(capsys, *command, model_folder, "--overwrite")
    assert "the folder of the base model" in error
    (tmp_path / "file").write_text("")
    assert "a file" in refused(capsys, *command, "file", "--overwrite")
    ok(*command, "fused")
    ok(*command, "fused", "--overwrite")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["export", "--to", "mlx", "--for", "vllm", "out"], "--for vllm"),
        (["export", "--to", "orbax", "--base-model", "x", "out"], "--base-model x"),
        (["export", "--adapter-path", "absent", "out"], "no such folder"),
        (["fuse", "--adapter-path", "absent"], "no such folder"),
        (["import", "absent", "--model", "bundled"], "no such folder"),
        (["import", ".", "--model", "bundled"], "a folder with notes.txt"),
        (["import", ".", "--model", "bundled", "--from", "peft"], "adapter_"),
    ],
)
def test_bad_input_exits_with_code_2_and_a_message(command, message, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    assert message in refused(capsys, *command)
    assert not (tmp_path / "out").exists() and not (tmp_path / "adapters").exists()


def test_an_adapter_of_another_model_shape_creates_no_run(
    run_folder, model_folder, tmp_path, capsys
):
    ok("export", "--adapter-path", run_folder, "served")
    other = shutil.copytree(model_folder, tmp_path / "other")
    model = Llama(TINY).clone(config=TINY.__class__(**{**vars(TINY), "num_hidden_layers": 1}))
    params = random_params(model)
    jl.models.save(other, model, params)
    error = refused(capsys, "import", "served", "--model", "other", "--adapter-path", "made")
    assert "layers.1.self_attn.q_proj" in error
    assert not (tmp_path / "made").exists()


def test_the_bundled_model_survives_export_and_import(tmp_path, capsys):
    options = ["--iters", "4", "--batch-size", "2", "--max-seq-length", "64", "--rank", "2"]
    ok("train", "--adapter-path", "run", "--progress", "none", "--val-batches", "1", *options)
    ok("export", "--adapter-path", "run", "--to", "peft", "served")
    config = json.loads((tmp_path / "served/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_path())
    ok("import", "served", "--model", "bundled", "--adapter-path", "back")
    _, params = jl.models.load(model_path(), dtype=jnp.float32)
    first, back = (
        jl.load_adapter(next((tmp_path / run).glob("step-*")), base={"params": params})
        for run in ("run", "back")
    )
    assert first.pairs.keys() == back.pairs.keys()
    jax.tree.map(np.testing.assert_array_equal, first.pairs, back.pairs)


def test_an_import_includes_a_changed_base_model(model_folder, tmp_path, capsys):
    model, params = jl.models.load(model_folder, dtype=jnp.float32)
    deeper, params = jl.models.replicate_layers(model, params, [[0, 2], [0, 1]])
    config = jl.LoraConfig(rank=2, targets=["q_proj"])
    kernels = jl.find_kernels(deeper.apply, {"params": params}, jnp.zeros((1, 4), jnp.int32))
    adapter = jl.lora_init(jax.random.key(0), {"params": params}, config, kernels=kernels)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    jl.peft.save("served", adapter, names=deeper.hf_names)
    settings = json.loads(Path("served/adapter_config.json").read_text())
    settings["layer_replication"] = [[0, 2], [0, 1]]
    Path("served/adapter_config.json").write_text(json.dumps(settings))

    ok("import", "served", "--model", model_folder)
    assert "adapters/base: " in capsys.readouterr().out
    assert f"model: {tmp_path}/adapters/base\n" in Path("adapters/config.yaml").read_text()
    _, kept = jl.models.load("adapters/base")
    jax.tree.map(np.testing.assert_array_equal, kept, params)
    ok("fuse", "--adapter-path", "adapters", "--save-path", "fused")
    _, fused = jl.models.load("fused")
    jax.tree.map(
        np.testing.assert_array_equal, fused, jl.merge({"params": params}, adapter)["params"]
    )
    ok("generate", "--adapter-path", "adapters", "--prompt", "how many", "--max-tokens", 2)
    ok("export", "--adapter-path", "adapters", "again")
    again = json.loads(Path("again/adapter_config.json").read_text())
    assert again["layer_replication"] == [[0, 2], [0, 1]]
