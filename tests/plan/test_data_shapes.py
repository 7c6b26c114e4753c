"""The shapes of a run's batches."""

import json

import pytest

from jax_lora.data.batches import Batches
from jax_lora.data.data_folder import read_data
from jax_lora.data.examples import make_examples
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.data_shapes import data_shapes
from tests.tiny_model import write_tokenizer

SETTINGS = TrainSettings(batch_size=2, grad_accumulation_steps=2, max_seq_length=64)


@pytest.fixture
def rows(tmp_path):
    answers = [" sql"] * 9 + [" count the rows" * 40] * 4
    lines = [json.dumps({"prompt": "how many rows?", "completion": text}) for text in answers]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_with_a_tokenizer_they_are_those_of_the_batches(rows, tmp_path):
    folder = write_tokenizer(tmp_path / "model")
    found = data_shapes(rows, folder, SETTINGS, 128)
    examples = make_examples(read_data(rows).split("train"), Tokenizer.load(folder), max_length=64)
    batches = Batches.of(examples.rows, 4)
    assert found.per_epoch == batches.per_epoch
    assert {shape[:2] for shape in found.shapes} == {shape for shape, _ in batches.buckets}
    assert found.tokens == sum(len(example.ids) for example in examples.rows)
    assert found.largest.length == 64


def test_without_one_every_row_counts_as_the_longest(rows):
    found = data_shapes(rows, rows, SETTINGS, 48)
    assert found.shapes == ((48, 48, 4),)
    assert (found.rows, found.tokens, found.per_epoch) == (13, None, 4)
    assert found.note.startswith("no tokenizer here: every row counts as 48 tokens")


def test_without_rows_there_is_a_step_and_no_epoch():
    found = data_shapes(None, None, SETTINGS, 1024)
    assert (found.largest, found.per_epoch) == ((64, 64, 1), None)
    assert "--data has the true ones" in found.note
