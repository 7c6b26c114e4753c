"""Names of folders that read as patterns, or as parts of a URL."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.cli import main
from jax_lora.finetune.run_folder import RunFolder, checkpoints_of, find_checkpoint
from jax_lora.finetune.training_state import load_opt_state, read_record, save_state
from jax_lora.models import Llama, save
from tests.tiny_model import TINY, random_params, write_tokenizer

NAMES = ["run [a]", "a*b", "q?", "**", "50% #1"]
BASE = {"kernel": jnp.ones((4, 4))}
ADAPTER = jl.Adapter(
    {"kernel": jl.LoraPair(np.ones((4, 2), np.float32), np.ones((2, 4), np.float32))},
    {},
    jl.LoraConfig(rank=2),
)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_saved_and_loaded_again(tmp_path, name):
    folder = tmp_path / name / name
    for value in (1.0, 2.0):
        scaled = jax.tree.map(lambda x, by=value: x * by, ADAPTER)
        jl.save_adapter(folder, scaled, base=BASE, overwrite=True)
        assert np.all(jl.load_adapter(folder, base=BASE).pairs["kernel"].a == value)
    assert len(list(folder.glob("arrays-*"))) == 1 and len(list(folder.iterdir())) == 2
    jl.peft.save(folder / "peft", ADAPTER, names={"kernel": "m.proj"})
    jl.peft.load(folder / "peft", BASE, names={"kernel": "m.proj"})


@pytest.mark.parametrize("name", NAMES[:1])
def test_arrays_do_not_depend_on_the_name_of_their_folder(tmp_path, name):
    for folder in (tmp_path / "plain", tmp_path / name):
        jl.save_adapter(folder, ADAPTER)
    files = [sorted(p.name for p in each.glob("arrays-*/*")) for each in tmp_path.iterdir()]
    assert files[0] == files[1] and "manifest.ocdbt" in files[0]


@pytest.mark.parametrize("name", ["run [a]", "**"])
def test_a_run_is_saved_and_read_again(tmp_path, name):
    def write(part):
        jl.save_adapter(part, ADAPTER, base=BASE)
        save_state(part, {"mu": np.ones(3)}, {"step": 1})

    run, _ = RunFolder.prepare(tmp_path / name)
    run.write_config({"rank": 2})
    for step in range(1, 4):
        run.save(step, write, keep=2)
    run, _ = RunFolder.resume(tmp_path / name, checkpoint="step-000003")
    assert checkpoints_of(run.path) == ["step-000002", "step-000003"]
    checkpoint = find_checkpoint(run.path)
    load_opt_state(checkpoint, read_record(checkpoint), {"mu": np.ones(3)})


@pytest.mark.slow
def test_the_command_trains_resumes_and_reads_in_such_folders(tmp_path, capsys):
    name = "a*b [c] q? 50% #1"
    model, data, run = (tmp_path / name / part for part in ("model", f"data {name}", f"run {name}"))
    write_tokenizer(model)
    save(model, Llama(TINY), random_params(Llama(TINY)))
    data.mkdir()
    lines = [json.dumps({"prompt": f"how many {n}?", "completion": f" {n}"}) for n in range(8)]
    for split in ("train", "valid", "test"):
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    words = ["train", str(model), "--data", str(data), "--rank", "2", "--targets", "q_proj"]
    words += ["--iters", "2", "--save-every", "1", "--progress", "none", "--adapter-path", str(run)]
    with jax.numpy_dtype_promotion("standard"):
        assert main(words) == 0, capsys.readouterr().err
        resumed = ["train", "--resume", str(run), "--iters", "3", "--progress", "none"]
        assert main(resumed) == 0, capsys.readouterr().err
        for command in (["eval"], ["generate", "--prompt", "how", "--max-tokens", "2"]):
            assert main([*command, "--adapter-path", str(run)]) == 0, capsys.readouterr().err
        fused = ["fuse", "--adapter-path", str(run), "--save-path", str(tmp_path / name / "fused")]
        assert main(fused) == 0, capsys.readouterr().err
