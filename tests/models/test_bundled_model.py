"""The bundled model is small, complete and readable by transformers, and can copy text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.bundled import data_path, model_path
from jax_lora.models import load
from tests.lora_cases import adapt, merged_tree

tokenizers = pytest.importorskip("tokenizers")
SENTENCE = "The builder of the city sets a new price for every window. The author is silent.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(model_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def answers(tokenizer):
    """Text -> its tokens and, at each, the probability the model gave it."""
    model, params = load(model_path(), dtype=jnp.float32)
    apply = jax.jit(model.apply)

    def probabilities(text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([0, *tokenizer.encode(text).ids])
        padded = jnp.zeros((1, 128), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids, jnp.int32))
        given = jax.nn.softmax(apply({"params": params}, padded)[0])  # (128, vocabulary)
        return ids[1:], np.asarray(given)[np.arange(len(ids) - 1), ids[1:]]

    return probabilities


def test_folder_is_at_most_ten_megabytes():
    assert sum(file.stat().st_size for file in model_path().iterdir()) <= 10_000_000


def test_model_has_three_to_five_million_parameters_in_bfloat16():
    _, params = load(model_path())
    leaves = jax.tree.leaves(params)
    assert 3e6 <= sum(leaf.size for leaf in leaves) <= 5e6
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("text", ["select a from b", "naïve — 東京 \U0001f600", "\ttab\r\n  end  "])
def test_tokens_give_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_stand_alone(tokenizer):
    assert tokenizer.encode("year 1990").tokens[-4:] == ["Ġ1", "9", "9", "0"]


def test_special_tokens_agree_with_the_configuration(tokenizer):
    config = json.loads((model_path() / "config.json").read_text())
    assert tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"]
    assert tokenizer.token_to_id("<|pad|>") == config["pad_token_id"]
    assert tokenizer.get_vocab_size() == config["vocab_size"]


def test_transformers_reads_the_same_tokenizer(tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(model_path()))
    text = "select name, 42 from users\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)


def test_the_model_predicts_its_language(answers):
    text = '    def __init__(self, name, value=None):\n        """Return the number of items."""\n'
    _, given = answers(text)
    assert -np.log(given).mean() < 2.5  # uniform predictions: log(4096) = 8.3


def test_model_copies_a_sentence_it_has_just_read(answers):
    ids, given = answers(SENTENCE * 2)
    half = len(ids) // 2
    fresh, again = np.median(given[:half]), np.median(given[half:])
    assert fresh < 0.3  # not known by heart
    assert again > 0.8


def test_paths_lead_to_the_bundled_files():
    assert (model_path() / "config.json").is_file()
    assert (data_path() / "train.jsonl").is_file()


@pytest.mark.slow
def test_a_batch_of_training_is_the_same_in_every_form():
    # As many tokens and as high a rank as the bundled task has: sizes at which a kernel is merged.
    model, params = load(model_path(), dtype="float32")
    variables = {"params": params}
    tokens = jax.random.randint(jax.random.key(0), (16, 80), 3, 2048)
    adapter = adapt(model.apply, variables, tokens, rank=32, targets="all-linear")
    merged = model.apply(merged_tree(variables, adapter), tokens)
    for form in ("auto", "merged", "factored"):
        with_lora = jl.lora_apply(model.apply, form=form, on_materialize="error")
        logits = jax.jit(with_lora)(jl.combine(variables, adapter), tokens)
        np.testing.assert_allclose(logits, merged, atol=1e-4 * np.abs(merged).max())
