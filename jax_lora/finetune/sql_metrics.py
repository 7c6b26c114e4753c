"""Metrics for generated SQL: exact match of the text, and execution match on a database.

Exact match is too strict, because the order of conditions can differ. Execution match is too
lenient, because different queries can return the same rows. Therefore, both are reported.

Generated queries are untrusted. They run on a temporary in-memory database that they can only
read, with few functions, and with limits on work, rows and sizes.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from jax_lora.errors import DataError

MAX_ROWS = 10_000
# A limit on SQLite instructions gives the same result on slow and fast machines, unlike a time
# limit. Scanning a table of 40 rows takes about 200 instructions.
MAX_INSTRUCTIONS = 1_000_000
_INSTRUCTIONS_PER_CHECK = 1_000
# A time limit in addition, because single instructions can be slow.
MAX_SECONDS = 10.0

# All other functions are refused: load_extension and writefile access files, random is not
# reproducible, zeroblob, printf and replace create huge values, and instr and trim take quadratic
# time.
FUNCTIONS = frozenset(
    "abs avg coalesce count ifnull length like lower max min nullif round substr substring sum "
    "total upper".split()
)
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 50,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 10,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
# Python 3.11 raises Warning for a second statement, and ValueError for a NUL byte or a lone
# surrogate.
_FAILURES = (sqlite3.Error, sqlite3.Warning, ValueError)

_Row = tuple[object, ...]


def exact_match(answer: str, reference: str) -> bool:
    r"""Return whether two queries have the same text, up to white space and a final semicolon.

    Case and the order of conditions matter.

    Example:
      >>> exact_match(" select name\nfrom books ;", "select name from books")
      True
      >>> exact_match("SELECT name FROM books", "select name from books")
      False
    """
    return _normalize(answer) == _normalize(reference)


def execution_match(answer: str, reference: str, database_sql: str) -> bool:
    """Return whether two queries return the same rows from a database.

    Use it together with `exact_match`: it also accepts queries with another text and the same
    result. Rows are compared in order if the reference has ORDER BY, and as a multiset otherwise;
    column names are ignored.

    Args:
      answer: The generated query, which is untrusted. A query that is invalid, that writes, that
        accesses anything outside the database, or that exceeds a limit is a mismatch.
      reference: The reference query.
      database_sql: A script that creates and fills the tables.

    Raises:
      DataError: The script or the reference query fails.

    Example:
      >>> script = "create table books (name, price); insert into books values ('A', 3), ('B', 5);"
      >>> execution_match("select name from books where 4 < price",
      ...                 "select name from books where price > 4", script)
      True
      >>> execution_match("drop table books", "select name from books", script)
      False
    """
    with closing(_build(database_sql)) as connection:
        try:
            expected = _run(connection, reference)
        except _FAILURES as error:
            raise DataError(
                "the reference query",
                got=f"{_clip(reference)} ({_clip(str(error))})",
                expected="one SELECT that runs on the example's database",
                fix="Correct the example's completion, or the .sql file of its database.",
            ) from error
        try:
            found = _run(connection, answer)
        except _FAILURES:
            return False
    return found == expected if _is_ordered(reference) else Counter(found) == Counter(expected)


def load_database(data_dir: str | Path, name: str) -> str:
    """Read the SQL script of an example's database, for `execution_match`.

    Args:
      data_dir: The data folder, which has the scripts in `databases/`.
      name: The example's `database`: letters, digits and underscores.

    Raises:
      DataError: The name has other characters, or there is no such script.

    Example:
      >>> load_database("data", "../secrets")
      Traceback (most recent call last):
      ...
      jax_lora.errors.DataError: data/databases
        got:      the database name '../secrets'
        expected: a name of letters, digits and underscores
        fix:      Set the example's "database" to the name of a file in that folder, without .sql.
    """
    folder = Path(data_dir) / "databases"
    # The name is untrusted, and must not give access to files outside the folder.
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,100}", name):
        raise DataError(
            str(folder),
            got=f"the database name {_clip(repr(name))}",
            expected="a name of letters, digits and underscores",
            fix='Set the example\'s "database" to the name of a file in that folder, without .sql.',
        )
    script = folder / f"{name}.sql"
    if not script.is_file() or not script.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            str(script),
            got="no such file in this folder",
            expected="the script that creates and fills the database",
            fix='Correct the example\'s "database", or add the script.',
        )
    return script.read_text(encoding="utf-8")


def _normalize(query: str) -> str:
    """Collapse white space, and remove a final semicolon."""
    return " ".join(query.split()).removesuffix(";").rstrip()


def _is_ordered(query: str) -> bool:
    """Return whether a query has ORDER BY outside of quoted strings."""
    return re.search(r"\border\s+by\b", re.sub(r"'[^']*'", "''", query), re.IGNORECASE) is not None


def _build(database_sql: str) -> sqlite3.Connection:
    """Create the database in memory; the script can create tables, but not access files."""
    connection = sqlite3.connect(":memory:")
    connection.set_authorizer(_may_build)
    _bound_work(connection)
    try:
        connection.executescript(database_sql)
    except _FAILURES as error:
        connection.close()
        raise DataError(
            "the database script",
            got=f"{_clip(database_sql)} ({_clip(str(error))})",
            expected="CREATE TABLE and INSERT statements that SQLite runs",
            fix="Correct the .sql file of the example's database.",
        ) from error
    for limit, value in _LIMITS.items():
        connection.setlimit(limit, value)
    connection.set_authorizer(_may_read)
    return connection


def _run(connection: sqlite3.Connection, query: str) -> list[_Row]:
    """Run a query within the limits, and return its rows."""
    _bound_work(connection)
    cursor = connection.execute(query)
    # An empty string or a comment runs without an error, but is not a query.
    if cursor.description is None:
        raise sqlite3.ProgrammingError("not a query")
    rows = cursor.fetchmany(MAX_ROWS + 1)
    cursor.close()
    if len(rows) > MAX_ROWS:
        raise sqlite3.DataError(f"more than {MAX_ROWS} rows")
    return rows


def _bound_work(connection: sqlite3.Connection) -> None:
    """Interrupt the next statements at the limit of instructions or time."""
    checks = iter(range(MAX_INSTRUCTIONS // _INSTRUCTIONS_PER_CHECK))
    deadline = time.monotonic() + MAX_SECONDS

    def must_stop() -> bool:
        return next(checks, None) is None or time.monotonic() > deadline

    connection.set_progress_handler(must_stop, _INSTRUCTIONS_PER_CHECK)


def _may_read(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Allow SELECT, reading tables, and the functions in `FUNCTIONS`."""
    allowed = (
        action == sqlite3.SQLITE_SELECT
        or (action == sqlite3.SQLITE_READ and not (first or "").startswith("sqlite_"))
        or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS)
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


_BUILDING = frozenset(
    getattr(sqlite3, f"SQLITE_{name}")
    for name in "CREATE_TABLE CREATE_INDEX INSERT UPDATE READ SELECT REINDEX TRANSACTION".split()
)


def _may_build(action: int, *_: str | None) -> int:
    """Allow creating and filling tables, but no ATTACH, pragmas or functions."""
    return sqlite3.SQLITE_OK if action in _BUILDING else sqlite3.SQLITE_DENY


def _clip(text: str) -> str:
    """Shorten a text for a message."""
    return text if len(text) <= 200 else f"{text[:200]}..."
