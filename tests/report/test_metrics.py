import csv
import json
import sys

import pytest

from jax_lora.errors import ConfigError, DataError
from jax_lora.report.metrics import MetricsLog, read_metrics

ROWS = [
    {"iter": 1, "train_loss": 0.5, "learning_rate": 1e-3},
    {"iter": 2, "train_loss": 0.25, "learning_rate": 1e-3},
    {"iter": 2, "val_loss": 0.4, "val_seconds": 0.1},
    {"iter": 3, "train_loss": float("nan"), "learning_rate": 1e-3},
]


def written(folder, rows=ROWS, **options):
    log = MetricsLog(folder, **options)
    for row in rows:
        log.log(row)
    log.close()
    return folder


def test_both_files_contain_every_row(tmp_path):
    rows = read_metrics(written(tmp_path))
    assert rows[:3] == ROWS[:3] and rows[3]["train_loss"] is None
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["iter"] for row in table] == ["1", "2", "2", "3"]
    assert [row["val_loss"] for row in table] == ["", "", "0.4", ""]


def test_a_resumed_run_writes_no_row_twice(tmp_path):
    written(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iter": 4, "train_lo')  # a kill
    written(tmp_path, [{"iter": 3, "train_loss": 0.2}], resume_at=2)
    assert [row["iter"] for row in read_metrics(tmp_path)] == [1, 2, 2, 3]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 5


def test_a_new_run_starts_with_empty_files(tmp_path):
    written(written(tmp_path), ROWS[:1])
    assert read_metrics(tmp_path) == ROWS[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file"),
        ('{"iter": 1}\n{"iter": 2', r"metrics.jsonl:2\n  got:      '{\"iter\": 2'"),
        ('{"step": 1}', "metrics.jsonl:1"),
        ('{"iter": 1, "train_loss": "low"}', "metrics.jsonl:1"),
        ("\xff\n", "metrics.jsonl:1"),
        ("[" * 5000, "metrics.jsonl:1"),
        (
            '{"iter": 1, "val_loss": [0.5]}',
            r"val_loss = \[0.5\]: expected a finite",
        ),
        ('{"iter": 1.5}', "iter = 1.5: expected an integer"),
        ('{"iter": 1, "iter": 2}', "metrics.jsonl:1"),
    ],
)
def test_damaged_metrics_are_an_error_with_the_line(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_is_an_error(tmp_path):
    with pytest.raises(DataError, match="a folder without metrics.jsonl"):
        read_metrics(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_metrics(tmp_path / "absent")


def test_tensorboard_gets_the_metrics_too(tmp_path):
    pytest.importorskip("tensorboardX")
    written(tmp_path, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train_loss" in events.read_bytes() and b"val_loss" in events.read_bytes()


def test_a_missing_tensorboardx_is_an_error_with_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match="tensorboardX is not installed"):
        MetricsLog(tmp_path, tensorboard=True)


def test_lines_are_valid_json(tmp_path):
    lines = (written(tmp_path) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iter"] for line in lines] == [1, 2, 2, 3]
