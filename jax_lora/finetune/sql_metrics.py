"""Judges an answer in SQL twice: by its text, and by what it finds in a database.

Text alone is too strict (`where a = 1 and b = 2` has a twin), results alone are too kind (two
different queries can find the same rows), so both are reported.

A model wrote the query, so it is run as a stranger's: on a database in memory that is thrown
away, reading only, with a handful of functions, and with bounds on work, rows and sizes.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from jax_lora.errors import DataError, format_error

MAX_ROWS = 10_000
# SQLite counts its own instructions: a limit on them, unlike one in seconds, judges alike on
# slow and fast machines. A scan of a table with 40 rows takes some 200.
MAX_INSTRUCTIONS = 1_000_000
_INSTRUCTIONS_PER_CHECK = 1_000
# The last resort, against instructions that are slow one by one.
MAX_SECONDS = 10.0

# Everything else is refused: load_extension and writefile reach files, random differs from run to
# run, zeroblob, printf or replace make huge values out of nothing, and instr and trim compare every
# character of one text with every one of another.
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
# Besides sqlite3.Error: Python 3.11 calls a second statement a Warning, and a NUL byte or a lone
# surrogate in the text a ValueError.
_FAILURES = (sqlite3.Error, sqlite3.Warning, ValueError)

_Row = tuple[object, ...]


def exact_match(answer: str, reference: str) -> bool:
    r"""Tell whether two queries are the same text, up to white space and a closing semicolon.

    Args:
      answer: What the model wrote.
      reference: The query that was asked for.

    Returns:
      True when they are the same. Case counts, and so does the order of conditions.

    Example:
      >>> exact_match(" select name\nfrom books ;", "select name from books")
      True
      >>> exact_match("SELECT name FROM books", "select name from books")
      False
    """
    return _normalise(answer) == _normalise(reference)


def execution_match(answer: str, reference: str, database_sql: str) -> bool:
    """Tell whether two queries find the same in a database.

    Use it beside `exact_match`: it accepts an answer that is written differently but means the
    same. Rows are compared in order when the reference has ORDER BY, and as a multiset otherwise;
    names of columns do not count.

    Args:
      answer: What the model wrote. Nothing is assumed of it: a query that is no SQL, that would
        write, that reaches outside the database, or that runs or grows without end, is a mismatch.
      reference: The query that was asked for.
      database_sql: A script that creates and fills the tables.

    Returns:
      True when both find the same rows.

    Raises:
      DataError: The script or the reference itself fails, so there is nothing to compare with.

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
                format_error(
                    "the reference query",
                    got=f"{_clip(reference)} ({_clip(str(error))})",
                    expected="one SELECT that runs on the row's database",
                    fix="Correct the row's completion, or the .sql file of its database.",
                )
            ) from error
        try:
            found = _run(connection, answer)
        except _FAILURES:
            return False
    return found == expected if _is_ordered(reference) else Counter(found) == Counter(expected)


def load_database(data_dir: str | Path, name: str) -> str:
    """Read the script of a database that a row of data names.

    Args:
      data_dir: The folder of the data; scripts are in `databases/` below it.
      name: The row's `database`: letters, digits and underscores.

    Returns:
      The SQL script, for `execution_match`.

    Raises:
      DataError: The name could lead out of the folder, or there is no such script.

    Example:
      >>> load_database("data", "../secrets")
      Traceback (most recent call last):
      ...
      jax_lora.errors.DataError: data/databases
        got:      the database name '../secrets'
        expected: a name of letters, digits and underscores
        fix:      Name a file of that folder in the row's "database", without its .sql ending.
    """
    folder = Path(data_dir) / "databases"
    # The name comes from a data file, and must not choose which file of this machine is read.
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,100}", name):
        raise DataError(
            format_error(
                str(folder),
                got=f"the database name {_clip(repr(name))}",
                expected="a name of letters, digits and underscores",
                fix='Name a file of that folder in the row\'s "database", without its .sql ending.',
            )
        )
    script = folder / f"{name}.sql"
    if not script.is_file() or not script.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            format_error(
                str(script),
                got="no such file in this folder",
                expected="the script that creates and fills the database",
                fix='Correct the row\'s "database", or put the script there.',
            )
        )
    return script.read_text(encoding="utf-8")


def _normalise(query: str) -> str:
    """Make every run of white space one space, and take a closing semicolon off."""
    return " ".join(query.split()).removesuffix(";").rstrip()


def _is_ordered(query: str) -> bool:
    """Tell whether a query asks for an order; what stands in quotes does not count."""
    return re.search(r"\border\s+by\b", re.sub(r"'[^']*'", "''", query), re.IGNORECASE) is not None


def _build(database_sql: str) -> sqlite3.Connection:
    """Run the script in memory; it may make tables, but not open files either."""
    connection = sqlite3.connect(":memory:")
    connection.set_authorizer(_may_build)
    _bound_work(connection)
    try:
        connection.executescript(database_sql)
    except _FAILURES as error:
        connection.close()
        raise DataError(
            format_error(
                "the database script",
                got=f"{_clip(database_sql)} ({_clip(str(error))})",
                expected="CREATE TABLE and INSERT statements that SQLite runs",
                fix="Correct the .sql file of the row's database.",
            )
        ) from error
    for limit, value in _LIMITS.items():
        connection.setlimit(limit, value)
    connection.set_authorizer(_may_read)
    return connection


def _run(connection: sqlite3.Connection, query: str) -> list[_Row]:
    """Return the rows of one query, within the bounds."""
    _bound_work(connection)
    cursor = connection.execute(query)
    # An empty text or a comment runs, and finds nothing: it is not an answer.
    if cursor.description is None:
        raise sqlite3.ProgrammingError("not a query")
    rows = cursor.fetchmany(MAX_ROWS + 1)
    cursor.close()
    if len(rows) > MAX_ROWS:
        raise sqlite3.DataError(f"more than {MAX_ROWS} rows")
    return rows


def _bound_work(connection: sqlite3.Connection) -> None:
    """Interrupt what runs next once it has used its instructions, or its time."""
    checks = iter(range(MAX_INSTRUCTIONS // _INSTRUCTIONS_PER_CHECK))
    deadline = time.monotonic() + MAX_SECONDS

    def must_stop() -> bool:
        return next(checks, None) is None or time.monotonic() > deadline

    connection.set_progress_handler(must_stop, _INSTRUCTIONS_PER_CHECK)


def _may_read(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Allow to select, to read the tables, and to call the functions named above."""
    allowed = (
        action == sqlite3.SQLITE_SELECT
        or (action == sqlite3.SQLITE_READ and not (first or "").startswith("sqlite_"))
        or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS)
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


_BUILDING = frozenset(
    {
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_INSERT,
        sqlite3.SQLITE_UPDATE,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_REINDEX,
        sqlite3.SQLITE_TRANSACTION,
    }
)


def _may_build(action: int, *_: str | None) -> int:
    """Allow to create and fill tables; attaching files, pragmas and functions are refused."""
    return sqlite3.SQLITE_OK if action in _BUILDING else sqlite3.SQLITE_DENY


def _clip(text: str) -> str:
    """Shorten what a message quotes."""
    return text if len(text) <= 200 else f"{text[:200]}..."
