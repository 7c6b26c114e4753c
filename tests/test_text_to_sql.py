"""The bundled task keeps its promises: no leak, equal difficulty, queries that run and tell."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from jax_lora.finetune.sql_metrics import exact_match, execution_match, load_database

ROOT = Path(__file__).parents[1]
DATA = ROOT / "jax_lora" / "bundled" / "text_to_sql"
COUNTS = {"train": 2000, "valid": 200, "test": 200}
PAIRS = [("train", "test"), ("train", "valid"), ("valid", "test")]
QUERY = re.compile(r"(?:table \w+: \w+(?:, \w+)+\n){1,2}question: (?P<question>[^\n]+)\nsql:")


@cache
def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]


def question_of(row: dict) -> str:
    match = QUERY.fullmatch(row["prompt"])
    return match["question"] if match else pytest.fail(f"odd prompt: {row['prompt']}")


def questions(split: str) -> list[str]:
    return [question_of(row) for row in rows(split)]


def tables_named(split: str) -> set[str]:
    return {
        name for row in rows(split) for name in re.findall(r"^table (\w+):", row["prompt"], re.M)
    }


@pytest.mark.parametrize(("split", "count"), COUNTS.items())
def test_every_split_has_its_rows(split: str, count: int):
    assert len(rows(split)) == count
    assert all(QUERY.fullmatch(row["prompt"]) for row in rows(split))
    assert all(re.fullmatch(r" select [^\n]*[^\n ]", row["completion"]) for row in rows(split))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_no_question_prompt_or_query_is_in_two_splits(one: str, other: str):
    assert not set(questions(one)) & set(questions(other))
    for key in ("prompt", "completion"):
        assert not {row[key] for row in rows(one)} & {row[key] for row in rows(other)}


@pytest.mark.parametrize("split", COUNTS)
def test_no_question_is_asked_twice(split: str):
    assert len(set(questions(split))) == len(rows(split))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_half_of_the_questions_are_over_schemas_that_training_never_sees(split: str):
    known = [row["database"] for row in rows(split) if row["known_schema"]]
    unknown = [row["database"] for row in rows(split) if not row["known_schema"]]
    assert len(known) == len(unknown) == len(rows(split)) // 2
    trained = {row["database"] for row in rows("train")}
    assert set(known) <= trained
    assert not set(unknown) & trained
    seen = tables_named("train")
    for row in rows(split):
        tables = set(re.findall(r"^table (\w+):", row["prompt"], re.M))
        assert tables <= seen if row["known_schema"] else not tables & seen


def test_valid_and_test_share_no_unknown_schema():
    valid, test = (
        {row["database"] for row in rows(split) if not row["known_schema"]}
        for split in ("valid", "test")
    )
    assert not valid & test


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_no_split_is_easier_than_training(split: str, known: bool):
    def difficulty(chosen: list[dict]) -> dict:
        count = Counter((row["shape"], row["prompt"].count("table ") == 2) for row in chosen)
        return {key: number / len(chosen) for key, number in count.items()}

    chosen = [row for row in rows(split) if row["known_schema"] is known]
    assert difficulty(chosen) == difficulty(rows("train"))
    assert len(difficulty(chosen)) == 50  # 25 shapes, each with one table and with two


KEYWORDS = set(
    "select from where and or like between order by desc limit group having count distinct "
    "avg sum min max".split()
)


@pytest.mark.parametrize("split", COUNTS)
def test_a_query_uses_only_what_its_prompt_shows(split: str):
    for row in rows(split):
        schema = dict(re.findall(r"^table (\w+): (.*)$", row["prompt"], re.M))
        sql, question = row["completion"], question_of(row)
        texts = re.findall(r"'[^']*'", sql)
        assert all(text.replace("%", "") in question for text in texts)
        bare = re.sub(r"'[^']*'", "", sql)
        numbers = re.findall(r"\b\d+\b", bare.removesuffix(" limit 1"))
        assert set(numbers) <= set(re.findall(r"\b\d+\b", question))
        names = set(re.findall(r"\b[a-z_]+\b", bare)) - KEYWORDS
        (table,) = names & set(re.findall(r" from (\w+)", bare))
        assert table in question.split()
        assert names - {table} <= set(schema[table].split(", "))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_references_run_and_judge_themselves_right(split: str):
    for row in rows(split):
        script = load_database(DATA, row["database"])
        assert exact_match(row["completion"], row["completion"])
        assert execution_match(row["completion"], row["completion"], script)


def test_a_blind_answer_finds_something_else():
    """Dropping the condition, or asking for another column, must be noticed."""
    blind = [row for row in rows("test") if " where " in row["completion"]]
    for row in blind:
        script = load_database(DATA, row["database"])
        assert not execution_match(row["completion"].split(" where ")[0], row["completion"], script)
    columns = [row for row in rows("test") if row["shape"] == "two_columns"]
    for row in columns:
        answer = re.sub(r"select (\w+), (\w+)", r"select \2, \1", row["completion"])
        assert not execution_match(answer, row["completion"], load_database(DATA, row["database"]))


def test_every_training_query_finds_something():
    for row in rows("train"):
        script = load_database(DATA, row["database"])
        assert execution_match(row["completion"], row["completion"], script)
        assert not execution_match("select 1 where 0", row["completion"], script)


@pytest.mark.parametrize("name", ["README.md", "databases/library.sql"])
def test_the_folder_is_complete(name: str):
    assert (DATA / name).is_file()


def test_the_generator_makes_the_same_bytes_again(tmp_path: Path):
    """On this Python, with another hash seed than the one that made the files."""
    script = ROOT / "examples" / "make_text_to_sql.py"
    command = [sys.executable, str(script), "--out", str(tmp_path)]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7"}, capture_output=True)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    kept = {path.relative_to(DATA) for path in DATA.rglob("*.sql")} | {
        Path(f"{split}.jsonl") for split in COUNTS
    }
    assert set(made) == kept
    for path in made:
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes(), path
