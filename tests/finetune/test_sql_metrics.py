"""The metrics are correct, and an untrusted query can neither do harm nor run forever."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from jax_lora.errors import DataError
from jax_lora.finetune import sql_metrics as judge

SCRIPT = """
CREATE TABLE books (title TEXT, author TEXT, price INTEGER);
INSERT INTO books VALUES ('Dawn', 'Reed', 5), ('Echo', 'Reed', 9), ('River', 'Lee', 7);
CREATE TABLE numbers (n INTEGER);
"""
SCRIPT += f"INSERT INTO numbers VALUES {', '.join(f'({n})' for n in range(200))};"


@pytest.mark.parametrize(
    "answer",
    ["select title from books", "  select title\n\tfrom books  ", "select title from books ;\n"],
)
def test_exact_match_ignores_white_space_and_a_final_semicolon(answer: str):
    assert judge.exact_match(answer, " select title from books")


@pytest.mark.parametrize(
    "answer",
    [
        "SELECT title FROM books",
        "select title from books;;",
        "select title , author from books",
        "selecttitle from books",
        "",
    ],
)
def test_exact_match_ignores_nothing_else(answer: str):
    assert not judge.exact_match(answer, "select title from books")


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("select title from books", "SELECT title FROM books;", True),
        ("select title from books order by price", "select title from books", True),
        ("select title as x from books", "select title from books", True),
        (
            "select title from books where 6 < price",
            "select title from books where price > 6",
            True,
        ),
        ("select author from books", "select title from books", False),
        # A multiset, not a set: Reed is there twice.
        ("select distinct author from books", "select author from books", False),
        ("select title from books", "select title from books order by price", False),
        ("select title from books order by price", "select title from books order by price", True),
        ("select title, author from books", "select author, title from books", False),
        ("select avg( price ) from books", "select sum(price) / 3.0 from books", True),
        # The words stand in quotes, so no order is asked for.
        ("select 'order by' from books", "select 'order by' from books order by 1", True),
        (
            "select title from books order by price",
            "select title from books where 'order by' > ''",
            True,
        ),
    ],
)
def test_execution_match_compares_results(answer: str, reference: str, same: bool):
    assert judge.execution_match(answer, reference, SCRIPT) is same


@pytest.mark.parametrize(
    "answer",
    [
        "",
        ";",
        "-- nothing",
        "no sql at all",
        "select",
        "select x from books",
        "select 'a\x00'",
        "\ud800",
    ],
)
def test_an_invalid_query_never_matches(answer: str):
    # A reference that finds nothing: finding nothing by failing must not equal it.
    assert not judge.execution_match(answer, "select title from books where price > 99", SCRIPT)


@pytest.mark.parametrize(
    "answer",
    [
        "select title from books; select title from books",
        "delete from books",
        "drop table books",
        "insert into books values ('x', 'y', 1)",
        "update books set price = 0",
        "create table other (x)",
        "pragma table_info(books)",
        "select * from pragma_table_info('books')",
        "select sql from sqlite_master",
        "select load_extension('x')",
        "select randomblob(1000000000)",
        "select zeroblob(1000000000)",
        "select printf('%1000000000d', 1)",
        "begin",
        "explain select title from books",
        "with recursive c(n) as (select 1 union all select n + 1 from c) select n from c",
    ],
)
def test_a_query_that_does_more_than_select_is_a_mismatch(answer: str):
    reference = "select title from books"
    with closing(judge._build(SCRIPT)) as connection:
        if not answer.startswith("explain"):  # harmless: it lists SQLite's own instructions
            with pytest.raises(judge._FAILURES):
                judge._run(connection, answer)
        assert len(judge._run(connection, reference)) == 3
    assert not judge.execution_match(answer, reference, SCRIPT)


@pytest.mark.parametrize("command", ["attach '{}' as other", "vacuum into '{}'"])
def test_neither_a_query_nor_a_script_can_create_a_file(command: str, tmp_path: Path):
    target = tmp_path / "made.db"
    statement = command.format(target)
    assert not judge.execution_match(statement, "select title from books", SCRIPT)
    with pytest.raises(DataError, match="the database script"):
        judge.execution_match("select 1", "select 1", f"{SCRIPT}; {statement};")
    assert not target.exists()


@pytest.mark.parametrize(
    "answer",
    [
        "select count(*) from numbers a, numbers b, numbers c, numbers d",  # 1.6e9 combinations
        "select a.n from numbers a, numbers b",  # 40,000 rows
        "select " + "(" * 5000 + "1" + ")" * 5000,
        "select 1 " + "union all select 1 " * 400,
        "select '" + "x" * 20_000 + "'",
    ],
)
def test_an_endless_query_is_interrupted(answer: str):
    start = time.perf_counter()
    assert not judge.execution_match(answer, "select 2", SCRIPT)
    assert time.perf_counter() - start < 5


def test_every_query_has_its_full_limit_of_instructions():
    with closing(judge._build(SCRIPT)) as connection:
        for _ in range(3):
            with pytest.raises(judge._FAILURES):
                judge._run(connection, "select count(*) from numbers a, numbers b, numbers c")
            assert judge._run(connection, "select count(*) from numbers a, numbers b") == [
                (40_000,)
            ]


def test_a_query_with_slow_instructions_exceeds_the_time_limit(monkeypatch: pytest.MonkeyPatch):
    with closing(judge._build(SCRIPT)) as connection:
        query = "select count(*) from numbers a, numbers b"
        assert judge._run(connection, query) == [(40_000,)]
        monkeypatch.setattr(judge, "MAX_SECONDS", 0.0)
        with pytest.raises(judge._FAILURES, match="interrupted"):
            judge._run(connection, query)


def test_a_failing_reference_query_is_a_data_error():
    with pytest.raises(
        DataError, match=r"reference query\n.*no such column: pages.*\n.*\n.*Correct"
    ):
        judge.execution_match("select 1", "select pages from books", SCRIPT)


def test_a_failing_script_is_a_data_error():
    with pytest.raises(DataError, match=r"database script\n.*syntax error.*\n.*CREATE TABLE"):
        judge.execution_match("select 1", "select 1", "create tabel books")


def test_a_message_quotes_no_more_than_200_characters():
    with pytest.raises(DataError) as caught:
        judge.execution_match("select 1", "select 1", "x" * 5000)
    assert len(str(caught.value)) < 600


def test_a_database_is_read_by_its_name(tmp_path: Path):
    (tmp_path / "databases").mkdir()
    (tmp_path / "databases" / "library.sql").write_text(SCRIPT)
    assert judge.load_database(tmp_path, "library") == SCRIPT
    assert judge.load_database(str(tmp_path), "library") == SCRIPT


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "a.b", "", ".", "a\n", "a\x00", 7, None]
)
def test_a_database_name_gives_no_access_outside_the_folder(name: str, tmp_path: Path):
    (tmp_path / "databases").mkdir()
    (tmp_path / "x.sql").write_text("secret")
    with pytest.raises(DataError, match="letters, digits and underscores"):
        judge.load_database(tmp_path, name)


def test_a_link_gives_no_access_outside_the_folder(tmp_path: Path):
    (tmp_path / "databases").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "databases" / "link.sql").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="no such file in this folder"):
        judge.load_database(tmp_path, "link")


def test_a_missing_database_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"databases.library\.sql\n.*no such file"):
        judge.load_database(tmp_path, "library")
