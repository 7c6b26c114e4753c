import json

import pytest

from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import DataError, ModelError
from tests.tiny_model import write_tokenizer


def test_text_comes_back_as_it_was(tokenizer):
    text = "select naïve\nfrom 'books' -- 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_that_uses_a_start_token_gets_exactly_one(tokenizer_with_bos):
    bos = tokenizer_with_bos.bos_id
    for text in ("rows", "<|start|>rows", ""):
        assert tokenizer_with_bos.encode(text).count(bos) == 1
        assert tokenizer_with_bos.encode(text)[0] == bos


def test_two_start_tokens_are_an_error(tokenizer_with_bos):
    with pytest.raises(DataError, match="two BOS tokens"):
        tokenizer_with_bos.encode("<|start|><|start|>rows")


def test_a_start_token_that_the_tokenizer_only_names_is_not_used(tmp_path):
    folder = write_tokenizer(tmp_path, bos="<|start|>", post=False)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.bos_id is None
    assert tokenizer.decode(tokenizer.encode("rows")[:1]).startswith("r")


def test_the_end_token_is_found_in_the_models_own_config(tmp_path):
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    assert Tokenizer.load(folder).eos_text == "<|end|>"


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="so that generation can stop"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("nested", [False, True], ids=["text model", "multimodal model"])
def test_an_end_token_without_an_embedding_is_named(tmp_path, nested):
    folder = write_tokenizer(tmp_path, special=["<stop>"])
    index = Tokenizer.load(folder)._backend.token_to_id("<stop>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<stop>"}))
    size = {"vocab_size": index}
    (folder / "config.json").write_text(json.dumps({"text_config": size} if nested else size))
    with pytest.raises(ModelError, match=rf"eos_token\n  got:      '<stop>', token {index}\n"):
        Tokenizer.load(folder)


def test_a_start_token_without_an_embedding_is_named(tmp_path):
    folder = write_tokenizer(tmp_path, bos="<|start|>")  # token 1
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1}))
    with pytest.raises(ModelError, match=r"bos_token\n  got:      '<\|start\|>', token 1\n"):
        Tokenizer.load(folder)


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer.json\n  got:      no such file"):
        Tokenizer.load(tmp_path)
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer_config.json"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="in the format of the tokenizers library"):
        Tokenizer.load(folder)


def test_every_token_with_a_new_line_in_it_can_end_a_line(tokenizer):
    found = tokenizer.ids_containing("\n")
    assert tokenizer.encode("\n")[0] in found
    assert all("\n" in tokenizer.decode([index]) for index in found)


def test_a_base_model_has_no_chat_template_and_says_what_to_do(tokenizer):
    with pytest.raises(ModelError, match="without a chat template") as caught:
        tokenizer.render([{"role": "user", "content": "hello"}])
    assert '"prompt" and "completion"' in str(caught.value)


def test_what_a_template_refuses_is_a_data_error(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, template=template))
    with pytest.raises(DataError, match="roles must alternate"):
        tokenizer.render([{"role": "user", "content": "hello"}])
