"""Tokenizers without tokenizer.json give the ids of the libraries that they come from."""

import json
import shutil
from pathlib import Path

import pytest

from jax_lora.data import sentencepiece_model
from jax_lora.data.encoder_tokenizer import EncoderTokenizer
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.data.tokenizer_backend import read_backend
from jax_lora.data.tokenizer_identity import tokenizer_identity
from jax_lora.errors import ModelError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
# sentencepiece itself adds no BOS and no EOS.
BARE = ("unigram", "unigram_bytes", "llama", "gemma", "bpe_symbols")


@pytest.fixture(params=EXPECTED["ids"])
def name(request):
    return request.param


def test_the_ids_are_those_of_the_reference(name):
    backend = read_backend(FIXTURES / name)
    for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"][name], strict=True):
        found = backend.encode(text, add_special_tokens=name not in BARE)
        assert found.ids == ids, (text, found.tokens)


def copied(tmp_path, name, **settings):
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def test_text_comes_back(name):
    text = "How many rows are in the table of books?"
    ids = read_backend(FIXTURES / name).encode(text).ids
    decoded = EncoderTokenizer.load(FIXTURES / name).decode(ids)
    assert decoded == (text.lower() if name == "bert" else text)


def test_special_tokens_are_those_of_the_class(tmp_path):
    llama = Tokenizer.load(FIXTURES / "llama")
    assert (llama.bos_id, llama.eos_text) == (1, "</s>")
    assert llama.encode("<s>[a]</s>")[::6] == [1, 2] or llama.encode("</s>") == [1, 2]
    assert Tokenizer.load(copied(tmp_path, "llama", add_bos_token=False)).bos_id is None
    gemma = Tokenizer.load(FIXTURES / "gemma")
    assert (gemma.bos_id, gemma.eos_id) == (2, 1)
    gpt2 = Tokenizer.load(FIXTURES / "gpt2")
    assert (gpt2.bos_id, gpt2.eos_text) == (None, "<|endoftext|>")
    assert Tokenizer.load(copied(tmp_path, "gpt2", add_bos_token=True)).bos_id == 0
    assert EncoderTokenizer.load(FIXTURES / "bert").mask_text == "[MASK]"
    masked = EncoderTokenizer.load(FIXTURES / "roberta").encode("a <mask>", max_length=9)
    assert masked.ids.tolist() == [0, 69, 4, 2] and masked.special.sum() >= 2


def test_a_t5_tokenizer_ends_texts_and_has_sentinels(tmp_path):
    folder = copied(tmp_path, "unigram", tokenizer_class="T5Tokenizer", add_bos_token=None)
    (folder / "tokenizer.model").rename(folder / "spiece.model")
    tokenizer = EncoderTokenizer.load(folder)
    pieces = tokenizer.size - 100
    ids = tokenizer.encode("rows <extra_id_0> <extra_id_99>", "rows", max_length=30).ids.tolist()
    assert [index for index in ids if index >= pieces] == [pieces + 99, pieces]
    assert ids.count(2) == 2 and ids[-1] == 2  # </s>


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, ["▁a", "</s>", "▁a"]),
        ({"legacy": False}, ["▁a", "</s>", "a"]),
        ({"add_prefix_space": False}, ["a", "</s>", "a"]),
    ],
)
def test_the_space_before_a_text(tmp_path, settings, tokens):
    backend = read_backend(copied(tmp_path, "llama", **settings))
    assert backend.encode("a</s>a", add_special_tokens=False).tokens == tokens


def test_added_tokens_have_their_ids_or_are_refused(tmp_path):
    folder = copied(tmp_path, "llama", additional_special_tokens=["<|user|>"])
    size = read_backend(FIXTURES / "llama").get_vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": size}))
    tokenizer = Tokenizer.load(folder)
    user, tool = size + 1, size
    assert tokenizer.encode("<tool><|user|>")[1:] == [tool, user]
    assert tokenizer.is_special(user) and not tokenizer.is_special(tool)
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": size + 7}))
    with pytest.raises(ModelError, match=r"the added token '<tool>' with the id"):
        Tokenizer.load(folder)


def test_the_files_are_part_of_the_identity(name, tmp_path):
    folder = copied(tmp_path, name)
    first = tokenizer_identity(folder, 0)
    assert first == tokenizer_identity(FIXTURES / name, 0)
    file = next(
        folder / each
        for each in ("tokenizer.model", "merges.txt", "vocab.txt")
        if (folder / each).is_file()
    )
    data = file.read_bytes()
    at = data.find(b"o")
    file.write_bytes(data[:at] + (b"%" if b"%" not in data else b"^") + data[at + 1 :])
    try:
        assert tokenizer_identity(folder, 0)["tokenizer"] != first["tokenizer"]
    except ModelError:  # two equal pieces
        assert name in BARE


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no pieces"),
        (b"\x00", "a field with the number 0"),
        (b"\xff" * 20, "an integer without an end"),
        (b"\x0a\xff\xff\xff\xff\x0f", "bytes behind the message"),
        (b"\x0b", "of the unknown kind 3"),
        (b"\x08\x01", "the number 1 instead of a message"),
        (b"\x0a\x00", "piece 0 without a text"),
        (b"\x0a\x03\x0a\x01\xff", "piece 0: "),
        (b"\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x7f", "piece 0 with the score nan"),
        (b"\x0a\x05\x0a\x01a\x18\x07", "piece 0 of the type 7"),
        (b"\x0a\x03\x0a\x01a", "0 unknown tokens"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x0a\x03\x0a\x01a", "two pieces with the same text"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x12\x02\x18\x03", "a model of the type 3"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x12\x03\xc0\x01\x01", "treat_whitespace_as_suffix"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x1a\x02\x28\x00", "escape_whitespaces=false"),
        (
            b"\x0a\x05\x0a\x01a\x18\x02\x1a\x06\x12\x04\xff\xff\x00\x00",
            "precompiled_charsmap: a trie",
        ),
        (
            b"\x0a\x05\x0a\x01a\x18\x02\x1a\xf4\x07\x12\xf1\x07\x00\x00\x00\x00" + b"a" * 1005,
            "a replacement of 1,005 bytes",
        ),
        (b"IQ== 0\nIg== 1\n", ""),  # a list of tiktoken
    ],
)
def test_a_damaged_sentencepiece_model_is_an_error(tmp_path, data, problem):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ModelError, match="a SentencePiece model") as caught:
        Tokenizer.load(tmp_path)
    assert problem in str(caught.value)


def test_no_damage_to_a_model_escapes_as_another_error(tmp_path, capfd):
    data = (FIXTURES / "unigram" / "tokenizer.model").read_bytes()
    for at in range(0, len(data), 37):
        changed = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        for each in (changed, data[:at]):
            (tmp_path / "tokenizer.model").write_bytes(each)
            try:
                EncoderTokenizer.load(tmp_path).encode("ＦＵＬＬ width ﬁne", max_length=99)
            except ModelError:
                pass


@pytest.mark.parametrize(
    ("name", "file", "text", "problem"),
    [
        ("gpt2", "merges.txt", "#version: 0.2\na b c\n", "model.merges.0 = ["),
        ("gpt2", "merges.txt", "e qqq\n", "expected two tokens of model.vocab"),
        ("gpt2", "vocab.json", '{"a": -1}', "a = -1: expected an integer"),
        ("gpt2", "vocab.json", '["a"]', "instead of an object"),
        ("roberta", "vocab.json", '{"a": 0}', "no sep_token (None) among its 1 tokens"),
        ("bert", "vocab.txt", "[UNK]\na\n", "no sep_token ('[SEP]')"),
        ("bert", "vocab.txt", b"\xff", "codec"),
        ("gpt2", "tokenizer_config.json", '{"tokenizer_class": "CLIPTokenizer"}', "CLIPTokenizer"),
        ("bert", "tokenizer_config.json", '{"do_basic_tokenize": false}', "do_basic_tokenize"),
        ("llama", "added_tokens.json", '{"a": "b"}', "a = 'b': expected an integer"),
        ("llama", "tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "content"),
        ("llama", "tokenizer_config.json", '{"legacy": "no"}', "legacy = 'no'"),
    ],
)
def test_a_damaged_vocabulary_is_an_error(tmp_path, name, file, text, problem):
    folder = copied(tmp_path, name)
    data = text if isinstance(text, bytes) else text.encode()
    (folder / file).write_bytes(data)
    with pytest.raises(ModelError) as caught:
        EncoderTokenizer.load(folder)
    assert problem in str(caught.value)


def test_a_large_file_is_not_parsed(name, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_LORA_LIMITS", "tokenizer_bytes=100")
    with pytest.raises(ModelError, match="more than 100 bytes"):
        EncoderTokenizer.load(FIXTURES / name)


@pytest.mark.parametrize(
    ("name", "most", "problem"),
    [
        ("_MOST_PIECES", 3, "more than 3 pieces"),
        ("_MOST_SYMBOLS", 1, "2 user-defined symbols, more than 1"),
        ("_LONGEST_PIECE", 3, "piece 0 of 5 characters"),
        ("_MOST_CHARACTERS", 9, "more than 9"),
    ],
)
def test_the_work_for_a_model_is_bounded(monkeypatch, name, most, problem):
    monkeypatch.setattr(sentencepiece_model, name, most)
    with pytest.raises(ModelError, match=problem):
        read_backend(FIXTURES / "bpe_symbols")
