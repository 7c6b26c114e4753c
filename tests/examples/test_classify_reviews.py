"""The example classify_reviews.py."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_lora.errors import DataError
from jax_lora.models import Roberta, RobertaConfig, save


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_columns_are_read_by_name(script, tmp_path):
    path = write(tmp_path / "a.tsv", "id\tlabel\tsentence", '1\t0\tso "dull"', "2\tyes\t fine ")
    assert script.read_tsv(path) == [('so "dull"', "0"), ("fine", "yes")]


def test_invalid_lines_are_listed_together(script, tmp_path):
    rows = ("fine\t1", "too\tmany\t1", "alone", "\t1", "no label\t", "dull\t0")
    path = write(tmp_path / "a.tsv", "sentence\tlabel", *rows)
    with pytest.raises(DataError) as caught:
        script.read_tsv(path)
    message = str(caught.value)
    for problem in (
        f"{path}:3: 3 columns instead of 2",
        f"{path}:4: 1 columns instead of 2",
        f"{path}:5: no sentence",
        f"{path}:6: no label",
    ):
        assert problem in message
    assert f"{path}:2" not in message and f"{path}:7" not in message


def test_only_the_first_invalid_lines_are_listed(script, tmp_path):
    path = write(tmp_path / "a.tsv", "sentence\tlabel", *["alone"] * 15)
    with pytest.raises(DataError) as caught:
        script.read_tsv(path)
    assert f"{path}:11:" in str(caught.value) and f"{path}:12:" not in str(caught.value)
    assert "and 5 more" in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["text\tlabel", "a\t1"], ":1\n  got:      the columns ['text', 'label']"),
        (["sentence\tlabel"], "no examples after the header"),
        ([], "the columns ['']"),
    ],
)
def test_files_without_columns_or_examples_are_refused(script, tmp_path, lines, message):
    with pytest.raises(DataError) as caught:
        script.read_tsv(write(tmp_path / "a.tsv", *lines))
    assert message in str(caught.value)


def test_unreadable_files_are_refused(script, tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    for name in ("a.tsv", "b.tsv"):
        with pytest.raises(DataError, match=name):
            script.read_tsv(tmp_path / name)


def test_labels_are_sorted(script):
    def names(*labels):
        return script.label_names([script.Review("a", label) for label in labels])

    assert names("10", "9", "0", "9") == ["0", "9", "10"]
    assert names("no", "yes", "maybe") == ["maybe", "no", "yes"]
    with pytest.raises(DataError, match="(?s)the label '2'.*only the labels of the training file"):
        script.check_labels(Path("dev.tsv"), [script.Review("a", "2")], ["0", "1"])


def test_generated_reviews_are_balanced_and_not_in_both_files(script, tmp_path):
    one, other = (script.read_tsv(path) for path in script.write_reviews(tmp_path))
    assert (len(one), len(other)) == (1024, 256)
    assert not {row.sentence for row in one} & {row.sentence for row in other}
    assert 0.45 < np.mean([row.label == "1" for row in one]) < 0.55
    labels = {row.sentence: row.label for row in one + other}
    assert labels["the plot was dull"] == "0" and labels["the plot was not dull"] == "1"


def test_every_example_is_in_one_batch_and_padding_has_no_weight(script):
    reviews = [script.Review("a b " * count, "01"[count % 2]) for count in range(1, 12)]
    words = script.Words([review.sentence for review in reviews])
    examples = script.Examples(reviews, ["0", "1"], words, 20)
    batches = list(examples.batches(4, list(range(10, -1, -1))))
    assert [batch.ids.shape for batch in batches] == [(4, 20), (4, 16), (4, 16)]
    assert np.concatenate([batch.weights for batch in batches]).tolist() == [1.0] * 11 + [0.0]
    assert batches[0].mask[0].sum() == 20  # cut
    assert batches[2].labels.tolist() == [1, 0, 1, 0]
    assert (batches[2].ids[3] == 1).all() and batches[2].mask[3].sum() == 1
    assert examples.rows[0] == [0, 4, 5, 2]


@pytest.mark.slow
def test_it_learns_and_saves_in_peft_format(script, tmp_path, capsys):
    train, dev = script.write_reviews(tmp_path)
    lines = train.read_text(encoding="utf-8").splitlines()
    write(train, *[line for line in lines if "not" not in line][:257])
    lines = dev.read_text(encoding="utf-8").splitlines()
    write(dev, *[line for line in lines if "not" not in line][:65])
    small = ["--width", "32", "--layers", "1", "--batch-size", "8", "--epochs", "4"]
    files = ["--train", str(train), "--dev", str(dev), "--out", str(tmp_path / "adapter")]
    before, after = script.run(script.parse([*small, *files]))
    assert before < 0.7 < 0.95 < after
    assert f"accuracy after:  {after:.3f}" in capsys.readouterr().out
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model."
    assert written[f"{prefix}classifier.out_proj.weight"].shape == (2, 32)
    assert f"{prefix}roberta.encoder.layer.0.attention.self.query.lora_A.weight" in written
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["classifier.dense", "out_proj"]


@pytest.mark.slow
def test_a_model_folder_has_its_own_tokenizer(script, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    train, dev = script.write_reviews(tmp_path)
    for path in (train, dev):
        write(path, *path.read_text(encoding="utf-8").splitlines()[:33])
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [*special, *sorted({*" ".join(script.THINGS + script.PRAISE + script.BLAME).split()})]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = ("bos_token", "pad_token", "eos_token", "unk_token")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **dict(zip(names, special, strict=True))
    ).save_pretrained(tmp_path / "model")
    config = RobertaConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=34,
    )
    model = Roberta(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    save(tmp_path / "model", model, params)
    files = ["--train", str(train), "--dev", str(dev), "--model", str(tmp_path / "model")]
    before, after = script.run(script.parse([*files, "--epochs", "1"]))
    assert 0.0 <= before <= 1.0 and 0.0 <= after <= 1.0


def test_one_file_alone_is_refused(script, tmp_path):
    with pytest.raises(DataError, match="only one of them"):
        script.run(script.parse(["--train", str(tmp_path / "a.tsv")]))


def test_an_error_is_a_message(script, tmp_path, monkeypatch):
    missing = str(tmp_path / "none.tsv")
    monkeypatch.setattr(sys, "argv", ["classify_reviews.py", "--train", missing, "--dev", missing])
    with pytest.raises(SystemExit, match=r"none\.tsv"):
        script.main()
