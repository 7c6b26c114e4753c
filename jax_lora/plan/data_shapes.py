"""Find the batch shapes of a run: from its data, or from the longest sequence that is allowed."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import NamedTuple

from jax_lora.data.batches import Batches
from jax_lora.data.columns import renaming
from jax_lora.data.data_folder import read_data
from jax_lora.data.examples import make_examples
from jax_lora.data.template_files import choose_template
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.data.tokenizer_backend import tokenizer_file
from jax_lora.finetune.settings import TrainSettings


class BatchShape(NamedTuple):
    """A sequence length, a number of target tokens, and the batches of an epoch that have them."""

    length: int
    targets: int
    batches: int


@dataclasses.dataclass(frozen=True)
class DataShapes:
    """The batch shapes of an epoch."""

    source: str  # where the data come from, for display
    shapes: tuple[BatchShape, ...]  # in order of length
    examples: int | None = None  # of an epoch; None without data
    tokens: int | None = None  # of an epoch without padding; None without data or a tokenizer
    note: str = ""  # how the shapes were found, if not from tokenized data

    @property
    def largest(self) -> BatchShape:
        """The shape with the highest peak memory."""
        return max(self.shapes, key=lambda shape: (shape.length, shape.targets))

    @property
    def per_epoch(self) -> int | None:
        """Batches of an epoch, or None without data."""
        return None if self.examples is None else sum(shape.batches for shape in self.shapes)


def data_shapes(
    data: str | Path | None,
    model: Path | None,
    settings: TrainSettings,
    max_length: int,
    *,
    asked: bool = False,
) -> DataShapes:
    """Find the shapes of the batches that `train` would make.

    Without data or a tokenizer, every example has the longest length allowed. Without data, a
    sequence length that was `asked` for, and is not the default, is planned even if the model
    supports only shorter ones (`max_length`). `model` is the folder with the tokenizer.

    Raises:
      DataError: An example cannot be used.
    """
    length = min(settings.max_seq_length, max_length)
    batch_size = settings.batch_size * settings.grad_accumulation_steps
    assumed = "every example counts as {} tokens, all of them target tokens"
    if data is None:
        beyond = asked and settings.max_seq_length > max_length
        length = settings.max_seq_length if beyond else length
        note = f"none, so {assumed.format(length)}"
        if beyond:
            note += f"; training truncates them at the {max_length} positions of this model"
        return DataShapes("none", (BatchShape(length, length, 1),), note=note)
    with renaming(settings.columns):
        file = read_data(data).split("train")
    if model is None or tokenizer_file(model) is None:
        shape = BatchShape(length, length, -(-len(file.rows) // batch_size))
        note = f"no tokenizer found: {assumed.format(length)}"
        return DataShapes(str(data), (shape,), len(file.rows), note=note)
    chosen = settings.chat_template
    tokenizer = Tokenizer.load(
        model,
        chat_template=None if chosen is None else choose_template(model, chosen),
        prompt_template=settings.prompt_template,
    )
    examples = make_examples(
        file,
        tokenizer,
        max_length=length,
        truncate=settings.truncate,
        mask_prompt=settings.mask_prompt,
    ).rows
    pack = settings.max_seq_length if settings.pack else None
    batches = Batches.of(examples, batch_size, seed=settings.seed, pack=pack)
    counted = collections.Counter((b.ids.shape[1], b.at.shape[1]) for b in batches.once())
    shapes = tuple(BatchShape(*shape, count) for shape, count in sorted(counted.items()))
    tokens = sum(len(example.ids) for example in examples)
    return DataShapes(str(data), shapes, len(examples), tokens)
