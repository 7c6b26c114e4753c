"""The command on BERT, RoBERTa, and T5: train, eval, predict or generate, resume."""

import csv
import itertools
import json

import numpy as np
import pytest

from jax_lora.cli.main import main
from tests.encoder_folders import model_folder

GOOD, BAD = ("good", "fine", "nice"), ("bad", "poor", "dull")
THINGS = ("film", "plot", "cast", "music")
SENTENCES = [
    (f"the {thing} {verb} {how} {word}".replace("  ", " "), "praise" if word in GOOD else "blame")
    for thing, verb, how, word in itertools.product(
        THINGS, ("is", "was"), ("", "very", "so"), GOOD + BAD
    )
]
FAST = ["--batch-size", "16", "--learning-rate", "0.003", "--rank", "4", "--progress", "none"]


def write_table(path, rows, separator="\t"):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def write_splits(folder, rows, kind="jsonl"):
    """A data folder: every fifth example for validation, and every fifth for the test."""
    folder.mkdir()
    splits = {"train": [], "valid": [], "test": []}
    for number, row in enumerate(rows):
        splits[{0: "valid", 1: "test"}.get(number % 5, "train")].append(row)
    for name, part in splits.items():
        if kind == "jsonl":
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}.jsonl").write_text(text)
        else:
            write_table(folder / f"{name}.{kind}", part, "\t" if kind == "tsv" else ",")
    return folder


def labeled(**names):
    return [{"text": text, "label": names.get(label, label)} for text, label in SENTENCES]


def scores(capsys, *arguments, json_file):
    assert main(["eval", *map(str, arguments), "--json", str(json_file)]) == 0
    capsys.readouterr()
    return json.loads(json_file.read_text())["adapter"]["all"]


@pytest.mark.parametrize(
    ("architecture", "variant", "kind"),
    [
        ("bert", "masked_lm", "tsv"),
        pytest.param("roberta", "masked_lm", "csv", marks=pytest.mark.slow),
    ],
)
def test_a_masked_language_model_becomes_a_classifier(
    tmp_path, capsys, architecture, variant, kind
):
    model = model_folder(tmp_path / "model", architecture, variant)
    data, run = write_splits(tmp_path / "data", labeled(), kind), tmp_path / "run"
    common = ["train", str(model), "--data", str(data), "--adapter-path", str(run), *FAST]
    assert main([*common, "--epochs", "30"]) == 0
    found = scores(capsys, "--adapter-path", run, json_file=tmp_path / "scores.json")
    assert found["accuracy"] > 0.9 and found["f1"] > 0.9 and found["exact"] is None

    texts = ["the plot was very nice", "the cast is dull"]
    arguments = [word for text in texts for word in ("--text", text)]
    assert main(["predict", "--adapter-path", str(run), *arguments]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] for line in lines] == ["praise", "blame"]
    assert all(abs(sum(line["labels"].values()) - 1) < 1e-5 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_classifier_with_the_datas_labels_keeps_its_head(tmp_path, capsys, architecture):
    model = model_folder(tmp_path / "model", architecture, "classifier")
    config = json.loads((model / "config.json").read_text())
    names = list(config["id2label"].values())
    rows = labeled(praise=names[0], blame=names[1])
    data, run = write_splits(tmp_path / "data", rows), tmp_path / "run"
    common = ["train", str(model), "--data", str(data), "--adapter-path", str(run), *FAST]
    assert main([*common, "--epochs", "30"]) == 0
    assert scores(capsys, "--adapter-path", run, json_file=tmp_path / "s.json")["accuracy"] > 0.8
    # The fused folder is a classifier that needs no adapter.
    fused = tmp_path / "fused"
    assert main(["fuse", "--adapter-path", str(run), "--save-path", str(fused), "--check"]) == 0
    assert main(["predict", str(fused), "--text", "the plot was nice"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["label"] == names[0]


def test_pairs_of_texts_are_classified(tmp_path, capsys):
    model = model_folder(tmp_path / "model", "bert", "masked_lm")
    draw = np.random.default_rng(0)
    chosen = draw.integers(len(SENTENCES), size=(60, 2))
    rows = [
        {
            "text_a": SENTENCES[a][0].removeprefix("the "),
            "text_b": SENTENCES[b][0].removeprefix("the "),
            "label": int(SENTENCES[a][1] == SENTENCES[b][1]),
        }
        for a, b in chosen
    ]
    data, run = write_splits(tmp_path / "data", rows), tmp_path / "run"
    common = ["train", str(model), "--data", str(data), "--adapter-path", str(run), *FAST]
    assert main([*common, "--iters", "3", "--fine-tune-type", "full"]) == 0
    capsys.readouterr()
    file = data / "test.jsonl"
    out = tmp_path / "out.jsonl"
    arguments = ["predict", "--adapter-path", run, "--data", file, "--output", out]
    assert main(list(map(str, arguments))) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(file.read_text().splitlines())
    assert {line["label"] for line in lines} <= {"0", "1"}


def test_masked_tokens_of_pairs_are_predicted_in_batches(tmp_path, capsys):
    model = model_folder(tmp_path / "model", "bert", "masked_lm")
    rows = [
        {"text_a": "the plot was [MASK]", "text_b": "the [MASK] is very [MASK]"},
        {"text_a": "good", "text_b": "[MASK]"},
        {"text": "the film [MASK] good"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def predict(*options):
        assert main(["predict", str(model), "--data", str(file), *options]) == 0
        return [json.loads(line)["masks"] for line in capsys.readouterr().out.splitlines()]

    together, alone = predict("--top", "2"), predict("--top", "2", "--batch-size", "1")
    assert [[len(mask) for mask in masks] for masks in together] == [[2, 2, 2], [2], [2]]
    assert [[mask[0]["text"] for mask in masks] for masks in together] == [
        [mask[0]["text"] for mask in masks] for masks in alone
    ]
    file.write_text(json.dumps({"text_a": "good", "text_b": "film"}))
    assert "a text without a mask token" in refusal(capsys, "predict", model, "--data", file)


@pytest.mark.parametrize("architecture", ["roberta", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_masked_language_model_learns_texts(tmp_path, capsys, architecture):
    model = model_folder(tmp_path / "model", architecture, "masked_lm")
    rows = [{"text": text} for text, _ in SENTENCES]
    data, run = write_splits(tmp_path / "data", rows), tmp_path / "run"
    common = ["train", str(model), "--data", str(data), "--adapter-path", str(run), *FAST]
    assert main([*common, "--epochs", "30"]) == 0
    file = tmp_path / "scores.json"
    assert main(["eval", "--adapter-path", str(run), "--compare-base", "--json", str(file)]) == 0
    assert "accuracy" in capsys.readouterr().out
    found = json.loads(file.read_text())
    base, adapter = found["base"]["all"], found["adapter"]["all"]
    assert adapter["loss"] < 0.9 * base["loss"] and adapter["accuracy"] >= base["accuracy"]
    mask = "<mask>" if architecture == "roberta" else "[MASK]"
    text = f"the film {mask} very good"
    assert main(["predict", "--adapter-path", str(run), "--text", text, "--top", "3"]) == 0
    (masks,) = json.loads(capsys.readouterr().out)["masks"]
    assert len(masks) == 3 and masks[0]["probability"] >= masks[1]["probability"]


@pytest.mark.parametrize("variant", ["relu", pytest.param("gated", marks=pytest.mark.slow)])
def test_t5_learns_prompts_and_completions(tmp_path, capsys, variant):
    model = model_folder(tmp_path / "model", "t5", variant)
    rows = [
        {"prompt": text, "completion": "good film" if label == "praise" else "bad film"}
        for text, label in SENTENCES
    ]
    data, run = write_splits(tmp_path / "data", rows), tmp_path / "run"
    common = ["train", str(model), "--data", str(data), "--adapter-path", str(run), *FAST]
    assert main([*common, "--epochs", "60", "--rank", "8"]) == 0
    found = scores(capsys, "--adapter-path", run, json_file=tmp_path / "scores.json")
    assert found["exact"] > 0.8
    arguments = ["generate", "--adapter-path", str(run), "--prompt", "the plot was very nice"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == "good film"


def test_a_run_of_a_classifier_resumes_to_the_bit(tmp_path, capsys):
    model = model_folder(tmp_path / "model", "bert", "masked_lm")
    data = write_splits(tmp_path / "data", labeled())

    def train(run, iters, *more):
        arguments = ["train", str(model), "--data", str(data), "--adapter-path", str(run), *FAST]
        return main([*arguments, "--iters", str(iters), "--lr-schedule", "constant", *more])

    assert train(tmp_path / "whole", 6) == 0
    assert train(tmp_path / "part", 3) == 0
    assert train(tmp_path / "part", 6, "--resume") == 0
    metrics = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "part")
    ]
    losses = [[row["val_loss"] for row in each if "val_loss" in row][-1] for each in metrics]
    assert losses[0] == losses[1]


# Errors


def refusal(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    return capsys.readouterr().err


def test_options_that_a_model_does_not_support_are_refused_by_name(tmp_path, capsys):
    bert = model_folder(tmp_path / "bert", "bert", "masked_lm")
    t5 = model_folder(tmp_path / "t5", "t5", "relu")
    data = write_splits(tmp_path / "data", labeled())
    train = ["train", bert, "--data", data, "--adapter-path", tmp_path / "run", *FAST]
    assert "one of classification, masked-lm" in refusal(capsys, *train, "--task", "seq2seq")
    assert "expected: the task causal-lm" in refusal(capsys, *train, "--pack")
    assert "Use jax-lora predict" in refusal(capsys, "generate", bert, "--prompt", "good")
    assert "Use jax-lora generate" in refusal(capsys, "predict", t5, "--text", "good")
    assert "Use jax-lora predict" in refusal(capsys, "chat", bert)
    assert "without a mask token" in refusal(capsys, "predict", bert, "--text", "good film")
    classifier = model_folder(tmp_path / "classifier", "bert", "classifier")
    top = refusal(capsys, "predict", classifier, "--text", "good film", "--top", "3")
    assert "--top 3" in top and "a model for masked-lm" in top


def test_labels_that_do_not_fit_are_refused_with_their_line(tmp_path, capsys):
    model = model_folder(tmp_path / "model", "bert", "masked_lm")
    rows = labeled()
    rows[6]["label"] = "else"  # number 6 goes to the test, 5 to the validation
    rows[5]["label"] = "new"
    data = write_splits(tmp_path / "data", rows)
    train = ["train", model, "--data", data, "--adapter-path", tmp_path / "run", *FAST]
    message = refusal(capsys, *train)
    assert "valid.jsonl:2" in message and "'blame', 'praise'" in message
    one = write_splits(tmp_path / "one", labeled(blame="praise"))
    assert "at least two classes" in refusal(capsys, *train[:3], one, *train[4:])
    texts = [{"prompt": "good", "completion": "film"} for _ in range(10)]
    other = write_splits(tmp_path / "other", texts)
    assert 'an example with "text"' in refusal(capsys, *train[:3], other, *train[4:])
