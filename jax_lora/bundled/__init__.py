"""The bundled model and data set, with which everything runs offline."""

from pathlib import Path

__all__ = ["data_path", "model_path"]


def model_path() -> Path:
    """Return the folder of the tiny Llama: a Hugging Face folder with a tokenizer.

    Example:
      >>> sorted(file.name for file in model_path().glob("*.safetensors"))
      ['model.safetensors']
    """
    return Path(__file__).parent / "tiny_llama"


def data_path() -> Path:
    """Return the folder of the text-to-SQL data: `train.jsonl`, `valid.jsonl`, `test.jsonl`."""
    return Path(__file__).parent / "text_to_sql"
