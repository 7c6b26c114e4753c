import json

import pytest

from jax_lora.data.rows import Row, boolean_field, read_rows
from jax_lora.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}'


def written(tmp_path, content):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(tmp_path, content):
    with pytest.raises(DataError) as caught:
        read_rows(written(tmp_path, content))
    return str(caught.value)


def test_every_row_has_its_line_and_its_own_format(tmp_path):
    rows = read_rows(written(tmp_path, f'{GOOD}\n{{"text": "t"}}\n')).rows
    assert [(row.line, row.kind) for row in rows] == [(1, "completions"), (2, "text")]


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf" + GOOD.encode() + b"\n", GOOD.encode() + b"\r\n", GOOD.encode()],
    ids=["byte order mark", "CRLF", "no new line at the end"],
)
def test_what_editors_do_to_files_is_no_fault(tmp_path, content):
    file = read_rows(written(tmp_path, content))
    assert (len(file.rows), file.lines) == (1, 1)


def test_blank_lines_are_skipped_and_counted(tmp_path):
    file = read_rows(written(tmp_path, f"\n{GOOD}\n  \r\n{GOOD}\n\n"))
    assert [row.line for row in file.rows] == [2, 4]
    assert len(file.rows) + file.blank == file.lines == 5


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    row = json.dumps({"text": "a\u2028b"}, ensure_ascii=False)
    assert read_rows(written(tmp_path, row)).lines == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"}', 'no known format; the fields are "prompt"'),
        ('{"prompt": 3, "completion": "b"}', '"prompt" is a number, not a string'),
        ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
        ('{"text": null}', '"text" is null, not a string'),
        ('{"text": "\\ud800"}', '"text" has half of a surrogate pair at character 1'),
        ("[1]", "a JSON list where an object is needed"),
        ("{'text': 'x'}", "not JSON: Expecting property name enclosed in double quotes"),
        ('{"messages": []}', '"messages" is an empty list'),
        ('{"messages": [{"role": "user"}]}', '"messages"[0] has no "content"'),
        ('{"messages": [{"role": "me", "content": "x"}]}', "\"messages\"[0]: unknown role 'me'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', 'no turn has the role "assistant"'),
        ('{"messages": ["x"]}', '"messages"[0] is a string, not an object'),
        (
            '{"messages": [{"role": "user", "content": [1]}]}',
            '"messages"[0]: "content" is a list, not a string',
        ),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_with_a_fix(tmp_path, line, reason):
    message = refused(tmp_path, f"{GOOD}\n{line}\n{GOOD}\n")
    assert f"train.jsonl:2: {reason}" in message
    assert "  fix: " in message
    assert "2 rows read + 1 refused = 3 lines" in message


def test_bytes_that_are_not_utf8_are_placed(tmp_path):
    message = refused(tmp_path, b'{"text": "caf\xe9"}\n')
    assert "train.jsonl:1: byte 14 of the line (0xe9) is not UTF-8" in message


def test_a_file_cut_in_its_last_line_is_told_from_bad_json(tmp_path):
    message = refused(tmp_path, f'{GOOD}\n{{"prompt": "a", "comple')
    assert "train.jsonl:2: the last line ends in the middle of a JSON value" in message


def test_ten_rows_are_shown_and_all_are_counted(tmp_path):
    message = refused(tmp_path, "{}\n" * 25 + GOOD)
    assert message.count("  fix: ") == 10
    assert "... and 15 more rows like these" in message
    assert "1 rows read + 25 refused = 26 lines" in message


def test_a_long_row_is_cut_at_200_characters_and_cannot_steer_the_terminal(tmp_path):
    message = refused(tmp_path, '{"x": "\x1b[2J' + "a" * 1_000_000 + '"}')
    shown = next(line for line in message.splitlines() if line.startswith("  row: "))
    assert len(shown) < 220 and "\x1b" not in shown


def test_an_empty_file_and_a_missing_one_are_refused(tmp_path):
    assert "no row in 2 lines" in refused(tmp_path, "\n\n")
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "absent.jsonl")


def test_the_field_that_groups_rows_is_boolean_in_every_row():
    rows = (Row(1, "text", {"text": "a", "new": True}), Row(2, "text", {"text": "b", "new": False}))
    assert boolean_field(rows) == "new"
    assert boolean_field((*rows, Row(3, "text", {"text": "c"}))) is None
