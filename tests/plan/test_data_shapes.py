"""The batch shapes of a run."""

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
def data(tmp_path):
    answers = [" sql"] * 9 + [" count the rows" * 40] * 4
    lines = [json.dumps({"prompt": "how many rows?", "completion": text}) for text in answers]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_with_a_tokenizer_shapes_are_those_of_the_batches(data, tmp_path):
    folder = write_tokenizer(tmp_path / "model")
    found = data_shapes(data, folder, SETTINGS, 128)
    examples = make_examples(read_data(data).split("train"), Tokenizer.load(folder), max_length=64)
    batches = Batches.of(examples.rows, 4)
    assert found.per_epoch == batches.per_epoch
    assert {shape[:2] for shape in found.shapes} == {shape for shape, _ in batches.buckets}
    assert found.tokens == sum(len(example.ids) for example in examples.rows)
    assert found.largest.length == 64


def test_without_a_tokenizer_every_example_has_the_longest_length(data):
    found = data_shapes(data, data, SETTINGS, 48)
    assert found.shapes == ((48, 48, 4),)
    assert (found.examples, found.tokens, found.per_epoch) == (13, None, 4)
    assert found.note.startswith("no tokenizer found: every example counts as 48 tokens")


def test_without_data_there_is_a_step_but_no_epoch():
    found = data_shapes(None, None, SETTINGS, 1024)
    assert (found.largest, found.per_epoch) == ((64, 64, 1), None)
    assert found.note == "none, so every example counts as 64 tokens, all of them target tokens"


def test_a_length_that_was_asked_for_is_planned_beyond_the_positions_of_the_model():
    found = data_shapes(None, None, SETTINGS, 48, asked=True)
    assert found.largest == (64, 64, 1)
    assert "training truncates them at the 48 positions" in found.note
    assert data_shapes(None, None, SETTINGS, 48).largest == (48, 48, 1)
