"""Weights in pickle files, which are never opened: their names, and how to convert them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# What trainers save beside the weights.
_OTHERS = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")
_SHARD = "pytorch_model-"
# weights_only: PyTorch reads tensors, and refuses everything that could run code.
_CODE = (
    "import sys, torch; from safetensors.torch import save_file; w = {}; "
    '[w.update(torch.load(f, "cpu", weights_only=True)) for f in sys.argv[2:]]; '
    "save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in w.items()}, "
    'sys.argv[1], {"format": "pt"})'
)


def pickle_names(names: Iterable[str]) -> list[str]:
    """Choose the names of pickle files, sorted.

    Example:
      >>> pickle_names(["pytorch_model.bin", "config.json"])
      ['pytorch_model.bin']
    """
    return sorted(
        name for name in names if name.endswith(_SUFFIXES) and not name.startswith(_OTHERS)
    )


def conversion_command(folder: Path, names: Sequence[str], target: str) -> str:
    """Return the shell command that writes pickled weights as one safetensors file.

    `names` are one file, or all shards of a model. The command needs torch and safetensors, and
    runs no code of the files.

    Example:
      >>> conversion_command(Path("model"), ["a.bin"], "b.safetensors").split("' ")[1]
      'model/b.safetensors model/a.bin'
    """
    shards = [name for name in names if name.startswith(_SHARD)]
    files = [shlex.quote(str(folder / name)) for name in names if not shards]
    files += [f"{shlex.quote(str(folder))}/{_SHARD}*.bin"] if shards else []
    where = shlex.quote(str(folder / target))
    return " ".join(["python -c", shlex.quote(_CODE), where, *files])


def convert_fix(source: str, *, adapter: bool = False) -> str:
    """Return the advice, with the command, to convert the pickled weights of a Hub name.

    Example:
      >>> print(convert_fix("owner/name"))
      save the model in the safetensors format, where you trust its files: python -c 'from
      transformers import AutoModelForCausalLM as M;
      M.from_pretrained("owner/name").save_pretrained("FOLDER")', or with the class of its
      architecture.
    """
    package, start = ("peft", "AutoPeftModelFor") if adapter else ("transformers", "AutoModelFor")
    code = (
        f"from {package} import {start}CausalLM as M; "
        f'M.from_pretrained({json.dumps(source)}).save_pretrained("FOLDER")'
    )
    kind = "adapter" if adapter else "model"
    return (
        f"save the {kind} in the safetensors format, where you trust its files: "
        f"python -c {shlex.quote(code)}, or with the class of its architecture."
    )
