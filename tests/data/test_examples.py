import json
from pathlib import Path

import pytest

from jax_lora.data.encoder_examples import (
    classification_examples,
    masked_lm_examples,
    seq2seq_examples,
)
from jax_lora.data.encoder_tokenizer import EncoderTokenizer
from jax_lora.data.encoding import encode_prompt
from jax_lora.data.examples import make_examples
from jax_lora.data.formats import check_fields
from jax_lora.data.rows import Row, RowFile
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import DataError
from tests.tiny_model import write_tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def rows_of(*fields, kind="completions"):
    rows = tuple(Row(line, kind, row) for line, row in enumerate(fields, start=1))
    return RowFile(Path("train.jsonl"), rows, len(rows), 0)


def only(file, tokenizer, **options):
    (example,) = make_examples(file, tokenizer, **options).rows
    return example


def learned_text(example, tokenizer):
    return tokenizer._backend.decode(example.ids[example.loss_mask].tolist(), False)


def test_the_completion_and_its_end_token_are_targets_and_the_prompt_is_not(tokenizer):
    example = only(rows_of({"prompt": "how many rows?", "completion": " count(*)"}), tokenizer)
    assert learned_text(example, tokenizer) == " count(*)<|end|>"
    assert tokenizer.decode(example.ids.tolist()) == "how many rows? count(*)"


def test_an_existing_end_token_is_not_doubled(tokenizer):
    example = only(rows_of({"prompt": "a", "completion": " b<|end|>"}), tokenizer)
    assert example.ids.tolist().count(tokenizer.eos_id) == 1
    assert learned_text(example, tokenizer) == " b<|end|>"


def test_a_prompt_has_the_same_ids_in_training_and_generation(tokenizer):
    # "select" is one token; the prompt "sel" alone is not a part of it.
    fields = {"prompt": "sel", "completion": "ect"}
    example = only(rows_of(fields), tokenizer)
    prompt = encode_prompt(fields, tokenizer)
    assert example.ids[: len(prompt)].tolist() == prompt
    assert learned_text(example, tokenizer) == "ect<|end|>"


def test_there_is_one_start_token_even_if_prompt_and_completion_merge(tokenizer_with_bos):
    for fields in ({"prompt": "sel", "completion": "ect"}, {"prompt": "a", "completion": " b"}):
        example = only(rows_of(fields), tokenizer_with_bos)
        assert example.ids.tolist().count(tokenizer_with_bos.bos_id) == 1
        assert not example.loss_mask[0]


def test_mask_prompt_decides_whether_prompts_are_targets(tokenizer):
    assert only(rows_of({"text": "count"}, kind="text"), tokenizer).loss_mask.all()
    row = rows_of({"prompt": "a", "completion": "b"})
    assert only(row, tokenizer, mask_prompt=False).loss_mask.all()


def test_long_examples_are_truncated_dropped_or_refused(tokenizer):
    rows = rows_of({"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": "x" * 99})
    cut = make_examples(rows, tokenizer, max_length=20)
    assert [len(example.ids) for example in cut.rows][1] == 20 and cut.cut == 1
    dropped = make_examples(rows, tokenizer, max_length=20, truncate="drop")
    assert (len(dropped.rows), dropped.dropped) == (1, (2,))
    with pytest.raises(DataError, match=r"train.jsonl:2\n  got:      101 tokens"):
        make_examples(rows, tokenizer, max_length=20, truncate="error")


def test_an_example_without_targets_is_dropped_and_its_line_reported(tokenizer):
    rows = rows_of({"prompt": "a", "completion": " b"}, {"prompt": "x" * 50, "completion": " b"})
    assert make_examples(rows, tokenizer, max_length=20).dropped == (2,)


def test_examples_without_any_target_are_an_error(tokenizer):
    rows = rows_of({"prompt": "x" * 50, "completion": " b"})
    with pytest.raises(DataError, match="1 examples without a target token in the first 20"):
        make_examples(rows, tokenizer, max_length=20)


TURNS = [
    {"role": "user", "content": "how many?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "rows?"},
    {"role": "assistant", "content": "three"},
]


def test_every_response_of_a_chat_with_its_end_is_a_target(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, template=CHATML))
    example = only(rows_of({"messages": TURNS}, kind="chat"), tokenizer)
    assert learned_text(example, tokenizer) == "two<|end|>three<|end|>"


def test_eos_is_added_if_the_template_does_not_end_responses(tmp_path):
    template = CHATML.replace("<|end|>", "\n")
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, template=template))
    example = only(rows_of({"messages": TURNS[:2]}, kind="chat"), tokenizer)
    assert learned_text(example, tokenizer) == "two\n<|end|>"


def test_a_start_token_from_the_chat_template_is_not_doubled(tmp_path):
    folder = write_tokenizer(tmp_path, bos="<|start|>", template="<|start|>" + CHATML)
    tokenizer = Tokenizer.load(folder)
    example = only(rows_of({"messages": TURNS}, kind="chat"), tokenizer)
    assert example.ids.tolist().count(tokenizer.bos_id) == 1


def test_responses_that_the_template_rewrites_have_no_loss(tmp_path):
    # As some templates do: what an earlier turn thought is left out once a later one follows.
    template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' and not loop.last %}short{% else %}{{ m.content }}{% endif %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, template=template))
    example = only(rows_of({"messages": TURNS}, kind="chat"), tokenizer)
    assert learned_text(example, tokenizer) == "three<|end|>"


def test_the_prompt_of_a_chat_is_everything_before_the_last_response(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, template=CHATML))
    ids = encode_prompt({"messages": TURNS}, tokenizer)
    assert tokenizer._backend.decode(ids, skip_special_tokens=False).endswith(
        "<|user|>rows?<|end|><|assistant|>"
    )


@pytest.mark.parametrize("encode", ["causal", "masked", "classes", "seq2seq"])
def test_a_token_without_an_embedding_is_refused_where_an_example_has_it(tmp_path, encode):
    folder = write_tokenizer(tmp_path, special=("<image>",))
    backend = Tokenizer.load(folder)._backend
    backend.add_special_tokens(["<behind>"])
    backend.save(str(folder / "tokenizer.json"))
    behind = backend.token_to_id("<behind>")
    assert behind is not None
    (folder / "config.json").write_text(json.dumps({"vocab_size": behind}))

    def examples(text):
        if encode == "causal":
            return make_examples(rows_of({"text": text}, kind="text"), Tokenizer.load(folder))
        tokenizer, cut = EncoderTokenizer.load(folder), {"max_length": 32}
        if encode == "seq2seq":
            file = rows_of({"prompt": text, "completion": "a"})
            return seq2seq_examples(file, tokenizer, eos_id=0, **cut)
        file = rows_of({"text": text}, kind="labeled")
        if encode == "masked":
            return masked_lm_examples(file, tokenizer, **cut)
        return classification_examples(file, tokenizer, ("a", "b"), **cut)

    assert len(examples("an <image> in the text").rows) == 1
    with pytest.raises(DataError, match=r"train.jsonl:1: (.|\n)*'<behind>', token") as caught:
        examples("a <behind> in the text")
    assert f"tokens with an embedding, from 0 to {behind - 1}" in str(caught.value)


def test_earlier_answers_of_alpaca_are_context(tokenizer):
    row = {"instruction": "a", "output": "b", "history": [["q", "earlier"]]}
    kind, fields = check_fields(row)
    example = only(rows_of(fields, kind=kind), tokenizer)
    assert "earlier" in tokenizer.decode(example.ids.tolist())
    assert learned_text(example, tokenizer) == "b<|end|>"
