"""The query shapes of the text-to-SQL task and their English phrasings.

A shape is an SQL template with several equivalent questions. Both have the same placeholders for
parts of a table:

    {t} table      {a} {b} columns to show      {c} text column    {g} text column to group by
    {v} {w} texts  {n} number column            {k} {m} numbers    {j} a small count    {p} a letter
    {op} comparison, in English "above" ...     {f} aggregate, in English "average" ...
    {sort} direction, "ascending" ...           {best} direction, "highest" ...
    {as} {cs} {gs} the plural of a column's name (questions only)

Function arguments are surrounded by spaces (`avg( price )`), so that a name always follows a space
and has the same tokens in the schema and in the query.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from text_to_sql_schemas import Column, Draw, Table

COMPARISONS = {
    ">": ("above", "over", "more than", "greater than"),
    "<": ("below", "under", "less than", "smaller than"),
    ">=": ("at least",),
    "<=": ("at most",),
}
AGGREGATES = {
    "avg": ("average", "mean"),
    "sum": ("total",),
    "min": ("lowest", "smallest", "minimum"),
    "max": ("highest", "largest", "maximum"),
}
SORTED = {"": ("ascending", "from low to high"), " desc": ("descending", "from high to low")}
BEST = {"": ("lowest", "smallest"), " desc": ("highest", "largest")}
# Their sums and averages would be meaningless.
LABEL_NUMBERS = re.compile(r"(^|_)(year|number|code|badge|room|row|seat)$")


@dataclass(frozen=True)
class Shape:
    """A kind of query and its questions."""

    name: str
    sql: str
    questions: tuple[str, ...]


SHAPES = (
    Shape(
        "column",
        "select {a} from {t}",
        (
            "show the {a} of all {t}",
            "list the {as} of all {t}",
            "what is the {a} of each row in {t}",
            "give me the {a} of every row in {t}",
        ),
    ),
    Shape(
        "two_columns",
        "select {a}, {b} from {t}",
        (
            "show the {a} and {b} of all {t}",
            "list the {a} and the {b} of all {t}",
            "what are the {a} and {b} of each row in {t}",
            "give me {a} and {b} of every row in {t}",
        ),
    ),
    Shape(
        "all_columns_where",
        "select * from {t} where {c} = {v}",
        (
            "show everything about {t} with {c} {v}",
            "show all columns of {t} where {c} is {v}",
            "list every detail of {t} whose {c} is {v}",
        ),
    ),
    Shape(
        "where_text",
        "select {a} from {t} where {c} = {v}",
        (
            "show the {a} of {t} with {c} {v}",
            "what is the {a} of {t} whose {c} is {v}",
            "list the {as} of {t} where {c} is {v}",
            "for {t} with {c} {v} give me the {a}",
        ),
    ),
    Shape(
        "where_compare",
        "select {a} from {t} where {n} {op} {k}",
        (
            "show the {a} of {t} with {n} {op} {k}",
            "what is the {a} of {t} whose {n} is {op} {k}",
            "list the {as} of {t} where {n} is {op} {k}",
            "for {t} with {n} {op} {k} give me the {a}",
        ),
    ),
    Shape(
        "where_number",
        "select {a} from {t} where {n} = {k}",
        (
            "show the {a} of {t} with {n} {k}",
            "what is the {a} of {t} whose {n} is {k}",
            "list the {as} of {t} where {n} equals {k}",
        ),
    ),
    Shape(
        "where_not",
        "select {a} from {t} where {c} != {v}",
        (
            "show the {a} of {t} whose {c} is not {v}",
            "list the {a} of {t} with {c} other than {v}",
            "for {t} where {c} is not {v} give me the {a}",
        ),
    ),
    Shape(
        "where_between",
        "select {a} from {t} where {n} between {k} and {m}",
        (
            "show the {a} of {t} with {n} between {k} and {m}",
            "what is the {a} of {t} whose {n} is between {k} and {m}",
            "list the {a} of {t} with {n} from {k} to {m}",
        ),
    ),
    Shape(
        "where_or",
        "select {a} from {t} where {c} = {v} or {c} = {w}",
        (
            "show the {a} of {t} with {c} {v} or {w}",
            "what is the {a} of {t} whose {c} is {v} or {w}",
            "list the {a} of {t} where {c} is either {v} or {w}",
        ),
    ),
    Shape(
        "where_and",
        "select {a} from {t} where {c} = {v} and {n} {op} {k}",
        (
            "show the {a} of {t} with {c} {v} and {n} {op} {k}",
            "what is the {a} of {t} whose {c} is {v} and {n} is {op} {k}",
            "list the {as} of {t} where {c} is {v} and {n} is {op} {k}",
        ),
    ),
    Shape(
        "where_starts",
        "select {a} from {t} where {c} like {p}",
        (
            "show the {a} of {t} whose {c} starts with {p}",
            "list the {a} of {t} with {c} beginning with {p}",
            "for {t} where {c} starts with {p} give me the {a}",
        ),
    ),
    Shape(
        "where_order",
        "select {a} from {t} where {c} = {v} order by {n}{sort}",
        (
            "show the {a} of {t} with {c} {v} sorted by {n} {sort}",
            "list the {a} of {t} whose {c} is {v} ordered by {n} {sort}",
            "for {t} where {c} is {v} give me the {a} sorted by {n} {sort}",
        ),
    ),
    Shape(
        "count",
        "select count(*) from {t}",
        (
            "how many {t} are there",
            "count all {t}",
            "what is the number of {t}",
            "how many rows are in {t}",
        ),
    ),
    Shape(
        "count_where_text",
        "select count(*) from {t} where {c} = {v}",
        (
            "how many {t} have {c} {v}",
            "count the {t} whose {c} is {v}",
            "what is the number of {t} with {c} {v}",
        ),
    ),
    Shape(
        "count_where_compare",
        "select count(*) from {t} where {n} {op} {k}",
        (
            "how many {t} have {n} {op} {k}",
            "count the {t} whose {n} is {op} {k}",
            "what is the number of {t} with {n} {op} {k}",
        ),
    ),
    Shape(
        "distinct",
        "select distinct {g} from {t}",
        (
            "list the different {gs} of {t}",
            "which different {g} values occur in {t}",
            "show every {g} of {t} only once",
        ),
    ),
    Shape(
        "count_distinct",
        "select count( distinct {g} ) from {t}",
        (
            "how many different {gs} do {t} have",
            "count the different {g} values in {t}",
            "what is the number of different {gs} in {t}",
        ),
    ),
    Shape(
        "aggregate",
        "select {f}( {n} ) from {t}",
        (
            "what is the {f} {n} of all {t}",
            "find the {f} {n} in {t}",
            "show the {f} {n} of {t}",
        ),
    ),
    Shape(
        "aggregate_where",
        "select {f}( {n} ) from {t} where {c} = {v}",
        (
            "what is the {f} {n} of {t} with {c} {v}",
            "find the {f} {n} of {t} whose {c} is {v}",
            "for {t} where {c} is {v} show the {f} {n}",
        ),
    ),
    Shape(
        "order",
        "select {a} from {t} order by {n}{sort}",
        (
            "show the {a} of all {t} sorted by {n} {sort}",
            "list the {as} of {t} ordered by {n} {sort}",
            "sort {t} by {n} {sort} and show the {a}",
        ),
    ),
    Shape(
        "top",
        "select {a} from {t} order by {n}{best} limit {j}",
        (
            "show the {a} of the {j} {t} with the {best} {n}",
            "which {j} {t} have the {best} {n}, show the {a}",
            "find the {j} {t} with the {best} {n} and list the {a}",
        ),
    ),
    Shape(
        "single_best",
        "select {a} from {t} order by {n}{best} limit 1",
        (
            "which {a} in {t} has the {best} {n}",
            "show the {a} of the one row in {t} with the {best} {n}",
            "what is the {a} of the row in {t} with the {best} {n}",
        ),
    ),
    Shape(
        "group_count",
        "select {g}, count(*) from {t} group by {g}",
        (
            "how many {t} are there for each {g}",
            "count the {t} per {g}",
            "show each {g} and its number of {t}",
        ),
    ),
    Shape(
        "group_aggregate",
        "select {g}, {f}( {n} ) from {t} group by {g}",
        (
            "what is the {f} {n} of {t} for each {g}",
            "find the {f} {n} of {t} per {g}",
            "show each {g} and the {f} {n} of its {t}",
        ),
    ),
    Shape(
        "group_having",
        "select {g} from {t} group by {g} having count(*) > {j}",
        (
            "which {gs} have more than {j} {t}",
            "show each {g} with more than {j} {t}",
            "list the {g} values that have more than {j} {t}",
        ),
    ),
)


def fill(shape: Shape, table: Table, draw: Draw) -> tuple[str, str] | None:
    """Fill the placeholders of a shape from a table.

    Args:
      shape: The kind of query.
      table: The table to query.
      draw: The source of random choices.

    Returns:
      The question and its SQL, or None if the table lacks a suitable column.
    """
    question = draw.pick(shape.questions)
    slots = set(re.findall(r"{(\w+)}", shape.sql))
    columns = _choose_columns(slots, table, draw)
    if columns is None:
        return None
    english = {slot: column.words for slot, column in columns.items()}
    english |= {f"{slot}s": _plural(column.words) for slot, column in columns.items()}
    sql = {slot: column.name for slot, column in columns.items()}
    shared = {"t": table.name, "j": str(2 + draw.below(8))} | _values(columns, table, draw)
    for slot, options in _WORDED.items():
        sql[slot] = draw.pick(_allowed(slot, options, columns))
        english[slot] = draw.pick(options[sql[slot]])
    english, sql = english | shared, sql | shared
    if "p" in sql:
        sql["p"] = sql["p"][:-1] + "%'"
    return question.format_map(english), shape.sql.format_map(sql)


_WORDED = {"op": COMPARISONS, "f": AGGREGATES, "sort": SORTED, "best": BEST}


def _allowed(slot: str, options: dict[str, tuple[str, ...]], columns: dict[str, Column]):
    """Return the options of a placeholder; years and room numbers have no sum or average."""
    if slot == "f" and LABEL_NUMBERS.search(columns["n"].name if "n" in columns else ""):
        return ("min", "max")
    return tuple(options)


def _choose_columns(slots: set[str], table: Table, draw: Draw) -> dict[str, Column] | None:
    """Choose a different column for each placeholder, conditions first."""
    texts = [column for column in table.columns if column.is_text]
    options = {
        "n": [column for column in table.columns if not column.is_text],
        "g": [column for column in texts if len(column.texts) < len(table.rows) / 3],
        "c": texts,
        "a": table.columns,
        "b": table.columns,
    }
    chosen: dict[str, Column] = {}
    for slot, candidates in options.items():
        if slot in slots:
            free = [column for column in candidates if column not in chosen.values()]
            if not free:
                return None
            chosen[slot] = draw.pick(free)
    return chosen


def _values(columns: dict[str, Column], table: Table, draw: Draw) -> dict[str, str]:
    """Choose the values of conditions from existing rows, so that queries match rows."""
    row = draw.below(len(table.rows))
    values = {}
    if "c" in columns:
        texts = [str(value) for value in table.values(columns["c"])]
        others = [text for text in texts if text != texts[row]]
        values["v"] = f"'{texts[row]}'"
        values["w"] = f"'{draw.pick(others)}'"
        values["p"] = f"'{texts[row][0]}'"
    if "n" in columns:
        numbers = [int(value) for value in table.values(columns["n"])]
        low, high = sorted((numbers[row], draw.pick(numbers)))
        values["k"], values["m"] = (str(low), str(high))
    return values


def _plural(words: str) -> str:
    """Return the plural: city, cities; box, boxes; price, prices; floors, floors."""
    if re.search(r"[^isu]s$", words):
        return words
    if re.search(r"[^aeiou]y$", words):
        return words[:-1] + "ies"
    return words + ("es" if re.search(r"(s|x|ch|sh)$", words) else "s")
