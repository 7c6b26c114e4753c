import pytest

from jax_lora.cli import main


@pytest.fixture
def generate(model_folder, capsys):
    def run(*options, code=0):
        options = (*options, "--max-tokens", "6")
        assert main(["generate", str(model_folder), *options]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


def answer_of(out):
    return out.rpartition("\n[")[0]


def test_the_default_is_greedy_decoding(generate):
    plain = answer_of(generate("--prompt", "rows"))
    assert plain
    assert answer_of(generate("--prompt", "rows", "--temp", "0", "--top-k", "3")) == plain
    assert answer_of(generate("--prompt", "rows", "--top-k", "1", "--seed", "9")) == plain


def test_a_seed_reproduces_the_samples_and_another_seed_changes_them(generate):
    sampled = ("--prompt", "rows", "--temperature", "5")
    first = answer_of(generate(*sampled))
    assert answer_of(generate(*sampled, "--seed", "0")) == first
    assert answer_of(generate(*sampled, "--seed", "1")) != first
    # --top-p implies temperature 1.
    cut = answer_of(generate("--prompt", "rows", "--top-p", "0.99"))
    same = answer_of(generate("--prompt", "rows", "--top-p", "0.99", "--temperature", "1"))
    assert cut == same != answer_of(generate("--prompt", "rows"))


def test_a_completion_ends_before_a_stop_string(generate):
    whole = answer_of(generate("--prompt", "rows"))
    stop = whole[3:5]
    expected = whole[: whole.index(stop)]
    assert answer_of(generate("--prompt", "rows", "--stop", "never", "--stop", stop)) == expected


def test_completions_are_in_the_order_of_the_prompts(generate, tmp_path):
    alone = {text: answer_of(generate("--prompt", text)) for text in ("count", "a\\nb")}
    a, b = alone.values()
    expected = f"==> count\n{a}\n==> a\nb\n{b}"
    assert answer_of(generate("--prompt", "count", "--prompt", "a\\nb")) == expected
    (tmp_path / "prompts.txt").write_text("count\n\na\\nb\n")
    assert answer_of(generate("--prompts", str(tmp_path / "prompts.txt"))) == expected


def test_a_prompt_is_read_from_standard_input(generate, monkeypatch, tmp_path):
    expected = generate("--prompt", "count").rpartition("\n[")[0]
    (tmp_path / "prompt.txt").write_text("count")
    with (tmp_path / "prompt.txt").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert generate("--prompt", "-").rpartition("\n[")[0] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--top-k", "-1"], "top_k"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--stop", ""], "non-empty strings"),
        (["--prompt", ""], "at least one token"),
        (["--prompts", "absent.txt"], "--prompts absent.txt"),
        (["--prompts", "/dev/null"], "no prompt"),
    ],
)
def test_invalid_settings_exit_with_code_2_and_a_message(generate, options, message):
    assert message in generate(*options, code=2)


@pytest.mark.parametrize("options", [[], ["--prompt", "a", "--prompts", "b.txt"]])
def test_prompt_and_prompts_are_alternatives(options, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", *options])
    assert ended.value.code == 2
    assert "--prompt" in capsys.readouterr().err
