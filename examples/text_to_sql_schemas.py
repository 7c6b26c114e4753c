"""Read text_to_sql_schemas.txt and generate the rows of its tables.

All random choices use `random.Random.random()`, the only method whose sequence Python guarantees
between versions, so the databases are byte for byte the same everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SCHEMAS = Path(__file__).with_name("text_to_sql_schemas.txt")
ROWS_PER_TABLE = 40
# Few values, so that conditions and groups match several of the 40 rows.
VALUES_PER_COLUMN = 9

Value = str | int
T = TypeVar("T")


class Draw:
    """Reproducible random choices from a text seed."""

    def __init__(self, seed: str):
        """Seed the generator."""
        self._random = random.Random(seed)

    def below(self, count: int) -> int:
        """Return an integer in [0, count)."""
        return int(self._random.random() * count)

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """Return the options in a random order (Fisher-Yates)."""
        items = list(options)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items


@dataclass(frozen=True)
class Column:
    """A column with a list of possible texts, or a range of integers."""

    name: str
    texts: tuple[str, ...] = ()
    low: int = 0
    high: int = 0

    @property
    def is_text(self) -> bool:
        """Whether the column contains text."""
        return bool(self.texts)

    @property
    def words(self) -> str:
        """The name in a question: "birth year" for `birth_year`."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Table:
    """A table with its rows."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]

    @property
    def schema(self) -> str:
        """The schema line in the prompt."""
        return f"table {self.name}: {', '.join(column.name for column in self.columns)}"

    def values(self, column: Column) -> list[Value]:
        """Return the values of a column."""
        position = self.columns.index(column)
        return [row[position] for row in self.rows]


@dataclass(frozen=True)
class Database:
    """Two related tables, and the split that asks about them."""

    name: str
    split: str
    tables: tuple[Table, ...]

    @property
    def sql(self) -> str:
        """The SQL script that creates and fills the tables."""
        return "\n".join(_create(table) for table in self.tables)


def read_databases(path: Path = SCHEMAS) -> list[Database]:
    """Read every database of the file, and generate its rows."""
    pools: dict[str, tuple[str, ...]] = {}
    specs: dict[tuple[str, str], list[tuple[str, str]]] = {}
    section = database = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("== "):
            section = line[3:].strip()
        elif section == "pools":
            name, values = line.split(":")
            pools[name] = tuple(value.strip() for value in values.split(","))
        elif line.startswith(" "):
            name, columns = line.strip().split(": ")
            specs[section, database].append((name, columns))
        else:
            database = line.strip()
            specs[section, database] = []
    return [
        Database(name, split, tuple(_table(name, *table, pools) for table in tables))
        for (split, name), tables in specs.items()
    ]


def _table(database: str, name: str, spec: str, pools: dict[str, tuple[str, ...]]) -> Table:
    """Build a table and its rows from `column=values, ...`."""
    draw = Draw(f"rows/{database}/{name}")
    columns = []
    for position, part in enumerate(spec.split(", ")):
        column, values = part.split("=")
        if ".." in values:
            low, high = values.split("..")
            columns.append(Column(column, low=int(low), high=int(high)))
            continue
        texts = pools.get(values) or tuple(values.split("|"))
        # The first column identifies the row, so it uses its whole pool.
        keep = len(texts) if position == 0 else VALUES_PER_COLUMN
        columns.append(Column(column, texts=tuple(draw.shuffled(texts)[:keep])))
    rows = tuple(
        tuple(_value(column, row, position, draw) for position, column in enumerate(columns))
        for row in range(ROWS_PER_TABLE)
    )
    return Table(name, tuple(columns), rows)


def _value(column: Column, row: int, position: int, draw: Draw) -> Value:
    """Draw a cell; a first column of text cycles through its pool."""
    if not column.is_text:
        return column.low + draw.below(column.high - column.low + 1)
    return column.texts[row % len(column.texts)] if position == 0 else draw.pick(column.texts)


def _create(table: Table) -> str:
    """Return the CREATE TABLE and INSERT statements."""
    columns = ", ".join(f"{c.name} {'TEXT' if c.is_text else 'INTEGER'}" for c in table.columns)
    rows = ",\n".join(f"({', '.join(_literal(value) for value in row)})" for row in table.rows)
    return f"CREATE TABLE {table.name} ({columns});\nINSERT INTO {table.name} VALUES\n{rows};\n"


def _literal(value: Value) -> str:
    """Return a value as an SQL literal; no text contains a quote."""
    return f"'{value}'" if isinstance(value, str) else str(value)
