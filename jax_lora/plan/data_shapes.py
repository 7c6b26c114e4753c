"""The shapes of a run's batches: from the rows, or, where they are not known, the longest."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import NamedTuple

from jax_lora.data.batches import Batches
from jax_lora.data.data_folder import read_data
from jax_lora.data.examples import make_examples
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.finetune.settings import TrainSettings

_TOKENIZER = "tokenizer.json"


class BatchShape(NamedTuple):
    """A shape, and how many batches of an epoch have it."""

    length: int
    learned: int
    batches: int


@dataclasses.dataclass(frozen=True)
class DataShapes:
    """What is known of the data.

    Args:
      source: Where it is from, in words.
      shapes: The shapes, from short to long.
      rows: Rows of an epoch, or None without data.
      tokens: Real tokens of an epoch, or None where they were not counted.
      note: What should be known of how this was found.
    """

    source: str
    shapes: tuple[BatchShape, ...]
    rows: int | None = None
    tokens: int | None = None
    note: str = ""

    @property
    def largest(self) -> BatchShape:
        """The shape that takes the most memory."""
        return max(self.shapes, key=lambda shape: (shape.length, shape.learned))

    @property
    def per_epoch(self) -> int | None:
        """Batches of an epoch, or None without data."""
        return None if self.rows is None else sum(shape.batches for shape in self.shapes)


def data_shapes(
    data: str | Path | None, model: Path | None, settings: TrainSettings, longest: int
) -> DataShapes:
    """Find the shapes that `train` would make batches of.

    Args:
      data: The rows, or None.
      model: The model's folder, for its tokenizer; None without one.
      settings: Batch size, longest row, and what becomes of longer ones.
      longest: Tokens that the model's positions reach to.

    Returns:
      The shapes. Without rows, or a tokenizer, every row counts as the longest that is allowed.

    Raises:
      DataError: Rows that cannot be used.
    """
    length = min(settings.max_seq_length, longest)
    rows = settings.batch_size * settings.grad_accumulation_steps
    if data is None:
        note = f"every row counts as {length} tokens, all of them learned; --data has the true ones"
        return DataShapes("none", (BatchShape(length, length, 1),), note=note)
    file = read_data(data).split("train")
    if model is None or not (model / _TOKENIZER).is_file():
        batches = -(-len(file.rows) // rows)
        note = f"no tokenizer here: every row counts as {length} tokens, all of them learned"
        shapes = (BatchShape(length, length, batches),)
        return DataShapes(str(data), shapes, len(file.rows), note=note)
    examples = make_examples(
        file,
        Tokenizer.load(model),
        max_length=length,
        truncate=settings.truncate,
        mask_prompt=settings.mask_prompt,
    )
    pack = settings.max_seq_length if settings.pack else None
    batches = Batches.of(examples.rows, rows, seed=settings.seed, pack=pack)
    counted = collections.Counter((b.ids.shape[1], b.at.shape[1]) for b in batches.once())
    shapes = tuple(BatchShape(*shape, count) for shape, count in sorted(counted.items()))
    tokens = sum(len(example.ids) for example in examples.rows)
    return DataShapes(str(data), shapes, len(examples.rows), tokens)
