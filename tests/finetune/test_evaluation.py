import json

import pytest

from jax_lora.data.rows import read_rows
from jax_lora.finetune.evaluation import Evaluation
from jax_lora.finetune.generation import Generator

QUERIES = ["select a from t", "select b from t", "select count(*) from t", "select a, b from t"]


def write_rows(folder, **fields):
    rows = [
        {"prompt": f"{n}?", "completion": f" {sql}", "known_schema": n < 2, **fields}
        for n, sql in enumerate(QUERIES)
    ]
    (folder / "databases").mkdir(exist_ok=True)
    script = "create table t (a, b); insert into t values (1, 2), (3, 4);"
    (folder / "databases" / "letters.sql").write_text(script)
    file = folder / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(file)


@pytest.fixture
def answers(monkeypatch):
    """Answers in the place of the model's; in the order of the rows."""
    given = []
    monkeypatch.setattr(Generator, "answer", lambda self, prompts: [given.pop(0) for _ in prompts])
    return given


def test_groups_are_scored_separately_and_together(tmp_path, tiny, tokenizer, answers):
    # Right; right in what it finds; wrong; no SQL at all.
    answers += [QUERIES[0], "select b as x from t", "select a from t", "what?"]
    evaluation = Evaluation(write_rows(tmp_path, database="letters"), tokenizer, rows=3)
    scores = evaluation.score(*tiny)
    assert list(scores) == ["all", "known_schema: true", "known_schema: false"]
    shares = [(score.rows, score.exact, score.execution) for score in scores.values()]
    assert shares == [(4, 0.25, 0.5), (2, 0.5, 1.0), (2, 0.0, 0.0)]


def test_the_total_loss_is_the_token_mean_of_the_groups(tmp_path, tiny, tokenizer, answers):
    answers += QUERIES
    file = write_rows(tmp_path)
    scores = list(Evaluation(file, tokenizer).score(*tiny).values())
    tokens = [
        sum(len(tokenizer.encode(f" {sql}")) + 1 for sql in part)
        for part in (QUERIES[:2], QUERIES[2:])
    ]
    mean = (scores[1].loss * tokens[0] + scores[2].loss * tokens[1]) / sum(tokens)
    assert scores[0].loss == pytest.approx(mean, rel=1e-5)


def test_examples_without_a_database_have_no_execution_match(tmp_path, tiny, tokenizer, answers):
    answers += QUERIES
    score = Evaluation(write_rows(tmp_path), tokenizer).score(*tiny)["all"]
    assert (score.exact, score.execution) == (1.0, None)


def test_plain_text_has_only_a_loss(tmp_path, tiny, tokenizer):
    file = tmp_path / "test.jsonl"
    file.write_text('{"text": "count the rows"}\n')
    scores = Evaluation(read_rows(file), tokenizer).score(*tiny)
    assert list(scores) == ["all"]
    assert scores["all"].loss > 0 and scores["all"].exact is None


def test_progress_ends_with_all_of_the_work(tmp_path, tiny, tokenizer):
    file = tmp_path / "test.jsonl"
    file.write_text('{"text": "count the rows"}\n' * 3)
    seen = []
    Evaluation(read_rows(file), tokenizer, rows=2).score(
        *tiny, advance=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 3), (3, 3)]
