"""Generate the bundled text-to-SQL task: train, valid and test examples, and their databases.

    python examples/make_text_to_sql.py                  # into jax_lora/bundled/text_to_sql
    python examples/make_text_to_sql.py --out /tmp/sql   # into another folder

The splits follow these rules:

* Every 100 examples contain each of the 25 query shapes four times, once with two tables in the
  prompt. All splits are therefore equally difficult.
* Half of valid and half of test ask about databases that are not in train. Valid and test do not
  share these databases.
* No question, prompt or SQL statement occurs in two splits.
"""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

from text_to_sql_schemas import Database, Draw, Table, read_databases
from text_to_sql_shapes import SHAPES, Shape, fill

OUT = Path(__file__).parents[1] / "jax_lora" / "bundled" / "text_to_sql"
# The small splits come first, so that they choose freely.
SPLITS = {"test": 200, "valid": 200, "train": 2000}
TWO_TABLES_EVERY = 4

Row = dict[str, str | bool]


@dataclass
class Seen:
    """Texts already used: by earlier splits (`elsewhere`), and by the current split (`here`)."""

    elsewhere: set[str] = field(default_factory=set)
    here: set[str] = field(default_factory=set)

    def is_new(self, row: Row) -> bool:
        """Return whether question and SQL are new to this split and absent from earlier ones."""
        question, sql = question_of(row), str(row["completion"])
        return not ({question, sql} & self.elsewhere or question in self.here)

    def add(self, row: Row) -> None:
        """Add an example of the current split."""
        self.here |= {question_of(row), str(row["completion"])}

    def close_split(self) -> None:
        """Start the next split."""
        self.elsewhere |= self.here
        self.here = set()


def question_of(row: Row) -> str:
    """Return the question in the prompt of an example."""
    return str(row["prompt"]).split("\nquestion:")[1].split("\n")[0]


def make_rows(databases: list[Database]) -> dict[str, list[Row]]:
    """Generate every split."""
    seen = Seen()
    splits = {}
    for split, count in SPLITS.items():
        draw = Draw(f"text-to-sql/{split}")
        known = [database for database in databases if database.split == "known"]
        unknown = [database for database in databases if database.split == split]
        if split == "train":
            rows = _block(known, count, seen, draw)
        else:
            rows = _block(known, count // 2, seen, draw) + _block(unknown, count // 2, seen, draw)
        splits[split] = draw.shuffled(rows)
        seen.close_split()
    return splits


def _block(databases: list[Database], count: int, seen: Seen, draw: Draw) -> list[Row]:
    """Generate `count` examples with every shape equally often."""
    connections = {database.name: _connect(database) for database in databases}
    rows: list[Row] = []
    for number in range(count):
        shape = SHAPES[number % len(SHAPES)]
        two_tables = number // len(SHAPES) % TWO_TABLES_EVERY == 0
        row = _new_row(shape, two_tables, databases, connections, seen, draw)
        seen.add(row)
        rows.append(row)
    return rows


def _new_row(
    shape: Shape,
    two_tables: bool,
    databases: list[Database],
    connections: dict[str, sqlite3.Connection],
    seen: Seen,
    draw: Draw,
) -> Row:
    """Draw examples until one is new and its query selects some but not all rows."""
    while True:
        database = draw.pick(databases)
        table = draw.pick(database.tables)
        filled = fill(shape, table, draw)
        if filled is None:
            continue
        question, sql = filled
        row: Row = {
            "prompt": f"{_schema(database, table, two_tables, draw)}\nquestion: {question}\nsql:",
            "completion": f" {sql}",
            "database": database.name,
            "known_schema": database.split == "known",
            "shape": shape.name,
        }
        if seen.is_new(row) and is_telling(connections[database.name], sql):
            return row


def _schema(database: Database, table: Table, two_tables: bool, draw: Draw) -> str:
    """Return the schema of the table, or of both tables of its database in random order."""
    tables = draw.shuffled(database.tables) if two_tables else [table]
    return "\n".join(table.schema for table in tables)


def _connect(database: Database) -> sqlite3.Connection:
    """Create an SQLite database in memory."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(database.sql)
    return connection


def is_telling(connection: sqlite3.Connection, sql: str) -> bool:
    """Return whether a query selects rows, and fewer than without its condition."""
    found = connection.execute(sql).fetchall()
    if not found or None in found[0]:
        return False
    condition = re.search(r" from (\w+) where (.*?)(?= order by| group by|$)", sql)
    if condition:
        count = f"select count(*), sum(coalesce({condition[2]}, 0)) from {condition[1]}"
        every, caught = connection.execute(count).fetchone()
        return 0 < caught < every
    if " having " in sql:
        return len(found) < len(connection.execute(sql.split(" having ")[0]).fetchall())
    return True


def write(out: Path, databases: list[Database], splits: dict[str, list[Row]]) -> None:
    """Write the examples and databases, byte for byte the same on every system."""
    (out / "databases").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    for database in databases:
        script = out / "databases" / f"{database.name}.sql"
        script.write_text(database.sql, encoding="utf-8", newline="\n")


def column_names(databases: list[Database], split: str) -> set[str]:
    """Collect the column names of the databases of one split."""
    tables = [
        table for database in databases if database.split == split for table in database.tables
    ]
    return {column.name for table in tables for column in table.columns}


def main() -> None:
    """Generate the task and print a summary."""
    parser = argparse.ArgumentParser(description="Generate the bundled text-to-SQL task.")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder to write (default: %(default)s)"
    )
    out = parser.parse_args().out
    databases = read_databases()
    splits = make_rows(databases)
    write(out, databases, splits)
    tables = sum(len(database.tables) for database in databases)
    print(f"{len(databases)} databases, {tables} tables, {len(SHAPES)} query shapes -> {out}")
    for split, rows in splits.items():
        known = sum(bool(row["known_schema"]) for row in rows)
        unknown = len(rows) - known
        print(f"{split}: {len(rows)} examples, {known} on schemas of train, {unknown} on others")
    trained = column_names(databases, "known")
    for split in ("valid", "test"):
        names = column_names(databases, split)
        shared = len(names & trained)
        print(f"other schemas of {split}: {shared} of {len(names)} column names occur in train")


if __name__ == "__main__":
    main()
