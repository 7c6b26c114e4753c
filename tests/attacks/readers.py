"""Every reader of untrusted files, each with a small folder that it accepts."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from jax_lora.cli.options import DEFAULTS, make_settings, read_config_file
from jax_lora.data.encoder_tokenizer import EncoderTokenizer
from jax_lora.data.rows import read_rows
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.finetune import run_folder, training_state
from jax_lora.finetune.settings import TrainSettings
from jax_lora.models import Llama
from jax_lora.models.folder import weight_files
from jax_lora.models.read_config import read_config
from jax_lora.models.tensor_files import open_tensors
from jax_lora.peft.mlx import load_mlx, save_mlx
from jax_lora.storage.array_store import checksums
from jax_lora.storage.json_files import json_checksum
from tests.tiny_model import TINY, random_params, write_tokenizer

RECORDS = [{"prompt": "a, b", "completion": "c"}, {"prompt": "é", "completion": "f\ng"}]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@dataclasses.dataclass(frozen=True)
class Reader:
    """How to attack one reader.

    Attributes:
      make: Writes a folder that the reader accepts.
      files: The files in it that are mutated.
      read: Reads the folder.
      repair: Makes a mutated file valid again where that takes no secret, such as a checksum.
      binary: Whether the files are not JSON.
    """

    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    repair: Callable[[bytes], bytes] = lambda data: data
    binary: bool = False


@functools.cache
def tiny() -> tuple[Llama, Any, Mapping[str, Any], Any]:
    """Return a model, its parameters and kernels, and an adapter."""
    model = Llama(TINY)
    params = random_params(model)
    ids = jnp.zeros((1, 4), jnp.int32)
    kernels = jl.find_kernels(lambda p, i: model.apply({"params": p}, i), params, ids)
    config = jl.LoraConfig(rank=2, targets=["q_proj"])
    adapter = jl.lora_init(jax.random.key(0), params, config, kernels=kernels)
    return model, params, kernels, adapter


def _model(folder: Path) -> None:
    model, params, *_ = tiny()
    jl.models.save(folder, model, params)


def _shards(folder: Path) -> None:
    _model(folder)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "two").mkdir()
    (folder / "two" / "model.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    names = list(open_tensors(folder / "two"))
    weight_map = dict.fromkeys(names, "one.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _read_tensors(folder: Path) -> None:
    for tensor in open_tensors(folder).values():
        tensor.read()


def _tokenizer(folder: Path) -> None:
    write_tokenizer(folder, bos="<|start|>")
    token = {"eos_token": {"content": "<|end|>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(token))


def _vocabulary(name: str) -> Callable[[Path], None]:
    source = Path(__file__).parents[1] / "fixtures" / "tokenizers" / name
    return lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True) and None


def _read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(tokenizer.encode("how many rows? aaaa é"))


def _read_encoder_tokenizer(folder: Path) -> None:
    tokenizer = EncoderTokenizer.load(folder)
    tokenizer.decode(tokenizer.encode("how many", "rows? é", max_length=8).ids.tolist())


def _peft(folder: Path) -> None:
    model, _, _, adapter = tiny()
    jl.peft.save(folder, adapter, names=model.hf_names)


def _read_peft(folder: Path) -> None:
    model, params, *_ = tiny()
    jl.peft.load(folder, params, names=model.hf_names)


def _mlx(folder: Path) -> None:
    model, _, _, adapter = tiny()
    save_mlx(folder, adapter, names=model.hf_names)


def _read_mlx(folder: Path) -> None:
    model, params, *_ = tiny()
    load_mlx(folder, params, names=model.hf_names)


def _adapter(folder: Path) -> None:
    _, params, _, adapter = tiny()
    jl.save_adapter(folder, adapter, base=params)


def _read_adapter(folder: Path) -> None:
    jl.load_adapter(folder, tiny()[1])


def _adapter_arrays(folder: Path) -> None:
    """Give the files of the arrays fixed names."""
    _adapter(folder)
    manifest = folder / "adapter.json"
    values = json.loads(manifest.read_text())
    (folder / values["arrays"]).rename(folder / ARRAYS)
    stored = sorted(each for each in (folder / ARRAYS).rglob("*") if each.is_file())
    for number, file in enumerate(stored):
        (folder / f"names-{number}").write_text(file.relative_to(folder).as_posix())
        (folder / f"file-{number}").write_bytes(file.read_bytes())
    manifest.write_text(json.dumps(values | {"arrays": ARRAYS}))


def _read_adapter_arrays(folder: Path) -> None:
    """Read the arrays with checksums that match, as an attacker would write them."""
    for names in folder.glob("names-*"):
        content = (folder / names.name.replace("names", "file")).read_bytes()
        (folder / names.read_text()).write_bytes(content)
    manifest = folder / "adapter.json"
    values = json.loads(manifest.read_text()) | {"files": checksums(folder / ARRAYS)}
    manifest.write_bytes(seal(json.dumps(values).encode()))
    _read_adapter(folder)


def seal(data: bytes) -> bytes:
    try:
        values = json.loads(data)
        del values["seal"]
        return json.dumps(values | {"seal": json_checksum(values)}).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return data


ARRAYS = "arrays-0123456789ab"
STATE = {"count": np.zeros((), np.int32), "mu": np.ones((2, 3), np.float32)}


def _run(folder: Path) -> None:
    run, _ = run_folder.RunFolder.prepare(folder)
    run.write_config(TrainSettings(targets=("q_proj",)).as_dict() | {"model": "m", "data": "d"})
    run.save(1, _checkpoint, (1.5, 1))


def _checkpoint(folder: Path) -> None:
    folder.mkdir()
    training_state.save_state(folder, STATE, {"step": 1})


def _read_run(folder: Path) -> None:
    run_folder.find_checkpoint(folder)
    # Whatever run.json holds, the last checkpoint is found by its name.
    checkpoint = run_folder.find_checkpoint(folder, last=True)
    run_folder.read_run_config(checkpoint)
    training_state.load_opt_state(checkpoint, training_state.read_record(checkpoint), STATE)


def _options(folder: Path) -> None:
    text = "rank: 8\nlearning_rate: 2e-4\ntargets: [q_proj, v_proj]\ntask: auto\nlog: &a [csv]\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lora.yaml").write_text(text)


def _read_options(folder: Path) -> None:
    make_settings(read_config_file(folder / "lora.yaml", DEFAULTS))


def _rows(name: str, text: str) -> Reader:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return Reader(make, (name,), lambda folder: read_rows(folder / name))


def _parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist([{**each, **CHAT} for each in RECORDS] * 20)
    pyarrow.parquet.write_table(table, folder / "train.parquet", compression="none")


LINES = "".join(json.dumps(each) + "\n" for each in [*RECORDS, CHAT])
CELLS = "".join(f'"{each["prompt"]}",{each["completion"]!r}\n' for each in RECORDS)

READERS: dict[str, Reader] = {
    "config": Reader(_model, ("config.json",), read_config),
    "model": Reader(_model, ("config.json",), jl.models.load),
    "index": Reader(_shards, ("model.safetensors.index.json",), weight_files),
    "tensors": Reader(_model, ("model.safetensors",), _read_tensors, binary=True),
    "tokenizer": Reader(
        _tokenizer,
        ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        _read_tokenizer,
    ),
    "sentencepiece": Reader(
        _vocabulary("unigram"), ("tokenizer.model",), _read_encoder_tokenizer, binary=True
    ),
    "byte_level": Reader(
        _vocabulary("gpt2"), ("vocab.json", "tokenizer_config.json"), _read_encoder_tokenizer
    ),
    "word_piece": Reader(_vocabulary("bert"), ("vocab.txt",), _read_encoder_tokenizer, binary=True),
    "encoder_tokenizer": Reader(_tokenizer, ("tokenizer.json",), _read_encoder_tokenizer),
    "peft": Reader(_peft, ("adapter_config.json",), _read_peft),
    "peft_tensors": Reader(_peft, ("adapter_model.safetensors",), _read_peft, binary=True),
    "mlx": Reader(_mlx, ("adapter_config.json",), _read_mlx),
    "adapter": Reader(_adapter, ("adapter.json",), _read_adapter, seal),
    "adapter_arrays": Reader(
        _adapter_arrays, tuple(f"file-{n}" for n in range(6)), _read_adapter_arrays, binary=True
    ),
    "run": Reader(_run, ("run.json", "config.yaml", "step-000001/training.json"), _read_run, seal),
    "options": Reader(_options, ("lora.yaml",), _read_options, binary=True),
    "jsonl": _rows("train.jsonl", LINES),
    "json": _rows("train.json", json.dumps([*RECORDS, CHAT])),
    "csv": _rows("train.csv", "prompt,completion\n" + CELLS),
    "tsv": _rows("train.tsv", "prompt\tcompletion\na\tb\n"),
    "parquet": Reader(
        _parquet,
        ("train.parquet",),
        lambda folder: read_rows(folder / "train.parquet"),
        binary=True,
    ),
}
