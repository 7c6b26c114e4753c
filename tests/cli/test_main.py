"""The command, run in this process on a model and data of a few kilobytes."""

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from jax_lora.cli import main
from jax_lora.cli.eval import table
from jax_lora.cli.main import CLI_MODULES, GROUPS, make_parser
from jax_lora.cli.names import parse
from jax_lora.cli.rows import SUBCOMMANDS
from jax_lora.cli.system_info import CLI_PACKAGES
from jax_lora.finetune.evaluation import Score
from jax_lora.models import Llama, LlamaConfig, save
from tests.tiny_model import TINY, random_params, write_tokenizer


def test_train_eval_and_generate_work_in_sequence(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert train() == 0
    out = capsys.readouterr().out
    assert "Iter 2: Train loss" in out and "Iter 2: Val loss" in out
    names = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert names == {
        "config.yaml",
        "loss.png",
        "metrics.csv",
        "metrics.jsonl",
        "run.json",
        "step-000002",
        "versions.json",
    }

    scores = tmp_path / "scores.json"
    assert main(["eval", "--compare-base", "--max-tokens", "4", "--json", str(scores)]) == 0
    written = json.loads(scores.read_text())
    assert written["base"]["all"]["rows"] == 8 and written["adapter"]["all"]["perplexity"] > 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["rows", "loss", "perplexity", "exact", "match"]
    assert lines[2].split() == ["base", "adapter"] * 3
    assert [line.split()[0] for line in lines[3:6]] == ["all", "seen:", "seen:"]
    assert "8 examples, " in lines[6] and "target tokens" in lines[6]

    assert (
        main(["generate", "--adapter-path", "adapters", "--prompt", "a", "--max-tokens", "3"]) == 0
    )
    assert "[1 + " in capsys.readouterr().out


def test_training_twice_keeps_the_first_run(train, tmp_path, capsys):
    assert train() == train() == 0
    assert "the earlier run in adapters is now in adapters.1" in capsys.readouterr().out
    assert (tmp_path / "adapters.1" / "step-000002").is_dir()


def test_the_config_of_a_run_reproduces_it(train, tmp_path, capsys):
    assert train("--seed", "3") == 0
    shutil.copy(tmp_path / "adapters/config.yaml", tmp_path / "again.yaml")
    assert main(["train", "-c", "again.yaml", "--adapter-path", "again"]) == 0
    assert "seed: 3\n" in (tmp_path / "again/config.yaml").read_text()
    first, again = (
        (tmp_path / run / "metrics.jsonl").read_text().splitlines()[0].split("learning_rate")[0]
        for run in ("adapters", "again")
    )
    assert first == again


def test_flags_override_the_config_file_which_overrides_the_defaults(train, tmp_path):
    text = "learning-rate: 2e-4\nsteps-per-report: 7\nseed: 5\nrank: 8\n"
    (tmp_path / "lora.yaml").write_text(text)
    assert train("-c", "lora.yaml", "--seed", "6", "--progress", "none") == 0
    config = (tmp_path / "adapters/config.yaml").read_text()
    for line in (
        "learning_rate: 0.0002",
        "steps_per_report: 7",
        "seed: 6",
        "rank: 2",
        "batch_size: 4",
    ):
        assert f"{line}\n" in config


def test_an_unknown_key_of_a_config_file_is_refused_with_a_suggestion(train, tmp_path, capsys):
    (tmp_path / "lora.yaml").write_text("learning_rat: 1\n")
    assert train("-c", "lora.yaml") == 2
    assert "Did you mean learning_rate?" in capsys.readouterr().err
    (tmp_path / "lora.yaml").write_text("- 1\n")
    assert train("-c", "lora.yaml") == 2
    assert "a list instead of a mapping" in capsys.readouterr().err


def test_an_invalid_example_is_reported_before_a_run_folder_is_created(train, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    assert train(data=tmp_path / "rows.jsonl") == 2
    error = capsys.readouterr().err
    assert "rows.jsonl:2: " in error and "Traceback" not in error
    assert not (tmp_path / "adapters").exists()


def test_the_message_for_a_missing_package_names_the_extra(train, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert train() == 2
    error = capsys.readouterr().err
    assert "the package tokenizers" in error and "pip install 'jax-lora[cli]'" in error


def test_another_missing_module_is_raised(monkeypatch):
    def run(options):
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    monkeypatch.setattr("jax_lora.cli.doctor.run", run)
    with pytest.raises(ModuleNotFoundError, match="absent"):
        main(["doctor"])


def test_every_package_of_the_extra_is_recognized():
    modules = {"PyYAML": "yaml"}
    assert {modules.get(name, name) for name in CLI_PACKAGES} == CLI_MODULES


def test_a_traceback_is_shown_on_demand(train, capsys):
    assert train("--rank", "0", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "q_prj"], "q_proj/kernel"),
        (["--rank", "0"], "rank"),
        (["--learning-rate", "-1"], "learning_rate"),
        (["--data", "absent"], "no such folder or file"),
        (["--model", "absent", "--data", "absent"], "absent"),
    ],
)
def test_bad_input_exits_with_code_2_and_a_message(train, options, message, capsys):
    assert train(*options) == 2
    assert message in capsys.readouterr().err


def test_a_nan_loss_exits_with_code_4(train, capsys):
    # Large enough that the second step overflows.
    assert train("--learning-rate", "1e38", "--max-grad-norm", "0", "--warmup", "0") == 4
    assert "step 2" in capsys.readouterr().err


def test_an_interrupted_run_exits_with_code_130_and_its_step(train, capsys, monkeypatch):
    from jax_lora.finetune import interrupts

    enter = interrupts.Interrupts.__enter__

    def already_asked(self):
        enter(self)._note(15, None)
        return self

    monkeypatch.setattr(interrupts.Interrupts, "__enter__", already_asked)
    assert train() == 130
    out = capsys.readouterr().out
    assert "SIGTERM: stopped after 0 steps" in out


def test_an_adapter_of_another_base_is_refused(train, model_folder, tmp_path, capsys):
    assert train() == 0
    other = shutil.copytree(model_folder, tmp_path / "other")
    model = Llama(TINY)
    save(other, model, random_params(model, seed=9))
    capsys.readouterr()
    assert main(["eval", str(other)]) == 2
    assert "base" in capsys.readouterr().err


def test_a_token_without_an_embedding_is_refused_with_its_line(tmp_path, data_folder, capsys):
    folder = write_tokenizer(tmp_path / "model")
    model = Llama(LlamaConfig(**{**vars(TINY), "vocab_size": 20}))
    save(folder, model, random_params(model))
    assert main(["train", str(folder), "--data", str(data_folder)]) == 2
    message = capsys.readouterr().err
    assert "train.jsonl:1: " in message and "with an embedding, from 0 to 19" in message


@pytest.mark.parametrize("family", ["bert/masked_lm", "roberta/classifier"])
def test_an_encoder_is_refused_before_it_is_loaded(family, capsys, monkeypatch):
    monkeypatch.setattr("jax_lora.cli.base_model.load", None)
    folder = Path(__file__).parent.parent / "fixtures" / family
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert "expected: a model for causal-lm or seq2seq" in error and str(folder) in error


def subcommands(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield inner
                yield from subcommands(inner)


@pytest.mark.parametrize(("width", "longest", "lines"), [(140, 90, 4), (80, 71, 6), (60, 71, 6)])
def test_the_table_of_eval_is_narrow_on_a_narrow_terminal(width, longest, lines):
    score = Score(rows=20, tokens=9, loss=4.4, exact=0.15, execution=0.2)
    groups = {"all": score, "known_schema: true": score}
    shown = table({"base": groups, "adapter": groups}, width)
    assert (max(map(len, shown)), len(shown)) == (longest, lines)


@pytest.mark.parametrize(("columns", "shares"), [("80", False), ("140", True)])
def test_a_wide_terminal_has_room_for_long_options(monkeypatch, capsys, columns, shares):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= int(columns)
    option = next(line for line in lines if "--grad-accumulation-steps N" in line)
    assert ("micro-batches per update" in option) == shares


@pytest.mark.parametrize("parser", list(subcommands(make_parser())), ids=lambda parser: parser.prog)
def test_the_help_of_a_subcommand_ends_with_an_example_that_parses(parser):
    _, found, examples = parser.format_help().rpartition("examples:\n")
    assert found and examples.strip()
    for line in examples.strip().splitlines():
        words, program = shlex.split(line), parser.prog.split()
        assert words[: len(program)] == program
        parse(make_parser(), words[1:])


@pytest.mark.parametrize("parser", list(subcommands(make_parser())), ids=lambda parser: parser.prog)
def test_every_option_has_a_sentence_with_its_default(parser):
    for action in parser._actions:
        if not action.option_strings or isinstance(action, argparse._StoreTrueAction):
            continue
        text = str(action.help)
        assert text.endswith("]") or "(required)" in text or "(or --" in text or action.nargs == 0


@pytest.mark.parametrize("parser", list(subcommands(make_parser())), ids=lambda parser: parser.prog)
def test_help_fits_a_terminal_of_80_columns(parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, parser.format_help().splitlines())) <= 80


READS = "train generate chat eval predict fuse export import push plan".split()
PLACES = {
    "--model": [*READS, "data check", "data show"],
    "--data": ["train", "eval", "predict", "plan", *map("data {}".format, SUBCOMMANDS)],
    "--adapter-path": [*READS, "plot"],
    "--save-path": [
        *("eval predict fuse export import push plan init plot".split()),
        *("data convert", "data split"),
    ],
}


def test_every_subcommand_names_what_it_reads_and_writes_alike():
    found = {option: [] for option in PLACES}
    for parser in subcommands(make_parser()):
        for action in parser._actions:
            for option in set(action.option_strings) & {*PLACES}:
                found[option].append(parser.prog.partition(" ")[2])
    assert {option: sorted(verbs) for option, verbs in found.items()} == {
        option: sorted(verbs) for option, verbs in PLACES.items()
    }


@pytest.mark.parametrize(
    ("older", "now"),
    [
        ("train m --data d", "train --data d --model m"),
        ("train --data d m", "train --model m --data d"),
        ("eval m --json f", "eval --model m --save-path f"),
        ("plan m --json -", "plan --model m --save-path -"),
        ("predict m --text a --output f", "predict --text a --model m --save-path f"),
        ("export served --to mlx", "export --to mlx --save-path served"),
        ("import a --model m --adapter-path r", "import --adapter-path a --model m --save-path r"),
        ("import a --model m", "import --adapter-path a --model m --save-path adapters"),
        ("import a --model m --save-path r", "import --adapter-path a --model m --save-path r"),
        ("push run o/n --model m", "push --adapter-path run --save-path o/n --model m"),
        ("push run --private o/n", "push --adapter-path run --private --save-path o/n"),
        ("push --adapter-path run o/n", "push --adapter-path run --save-path o/n"),
        ("push --model fused o/n", "push --model fused --save-path o/n"),
        ("data check d", "data check --data d"),
        ("data convert d -o f", "data convert --save-path f --data d"),
        ("data split d --output f", "data split --data d --save-path f"),
        ("init f", "init --save-path f"),
        ("plot a b -o f", "plot --adapter-path a b --save-path f"),
    ],
)
def test_older_spellings_mean_the_same(older, now):
    def values(line):
        found = vars(parse(make_parser(), line.split()))
        return {k: v for k, v in found.items() if k != "noted" and not k.startswith("word_")}

    assert values(older) == values(now)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export", "export\n  got:      no --save-path"),
        ("import --model m", "import\n  got:      no --adapter-path"),
        ("data split --data d", "data split\n  got:      no --save-path"),
        ("push owner/name", "push\n  got:      no --adapter-path and no --model"),
        ("import a --adapter-path b --save-path c --model m", "DIR and --adapter-path"),
    ],
)
def test_a_missing_or_contradicting_name_is_one_message(line, message, capsys):
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("line", ["train --no-such 1", "train one two", "doctor two"])
def test_an_unknown_word_or_option_is_refused(line, capsys):
    with pytest.raises(SystemExit):
        main(line.split())
    assert "unrecognized arguments: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "near"), [("train --rnk 3", "--rank"), ("data check --colums a=b", "--columns")]
)
def test_a_misspelled_option_is_corrected(line, near, capsys):
    with pytest.raises(SystemExit):
        main(line.split())
    assert f"did you mean {near}?" in capsys.readouterr().err


@pytest.mark.parametrize(("line", "listed"), [("", "train"), ("data", "check")])
def test_without_a_subcommand_the_help_lists_them(line, listed, capsys):
    assert main(line.split()) == 2
    assert f"\n  {listed}  " in capsys.readouterr().err


def test_another_model_is_not_trained_on_the_bundled_data_unless_asked(model_folder, capsys):
    assert main(["train", str(model_folder), "--dry-run"]) == 2
    assert "got:      no --data" in capsys.readouterr().err


def test_help_of_the_command_lists_the_subcommands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "usage: jax-lora SUBCOMMAND" in out
    parsers = {parser.prog.split()[-1] for parser in subcommands(make_parser())}
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert {name for names in GROUPS.values() for name in names} <= parsers & listed


@pytest.mark.parametrize(
    "command",
    [["train"], ["eval"], ["chat"], ["generate", "--prompt", "a"], ["predict", "--text", "a"]],
    ids=lambda command: command[0],
)
def test_two_different_models_are_refused(train, command, tmp_path, capsys):
    run = ["--adapter-path", "adapters"] if command[0] == "eval" and train() == 0 else []
    assert main([*command, "one", "--model", "two", *run]) == 2
    error = capsys.readouterr().err
    assert "error: MODEL and --model" in error and "got:      one and two" in error


def test_the_same_model_given_twice_is_accepted(train, model_folder):
    assert train("--model", str(model_folder), "--dry-run") == 0


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate [0.0002; bundled model: 0.005]" in out
