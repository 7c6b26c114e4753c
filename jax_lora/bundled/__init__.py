"""What comes with the package: a tiny base model and a task, so that everything runs offline."""

from pathlib import Path

__all__ = ["data_path", "model_path"]


def model_path() -> Path:
    """Folder of the tiny Llama (Hugging Face layout, tokenizer included).

    Example:
      >>> sorted(file.name for file in model_path().glob("*.safetensors"))
      ['model.safetensors']
    """
    return Path(__file__).parent / "tiny_llama"


def data_path() -> Path:
    """Folder of the text-to-SQL rows: `train.jsonl`, `valid.jsonl`, `test.jsonl`."""
    return Path(__file__).parent / "text_to_sql"
