"""Parse and format sizes, counts and durations."""

import pytest

from jax_lora.errors import ConfigError
from jax_lora.plan.units import read_bytes, show_bytes, show_count, show_seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24gb", 24 * 10**9),
        ("24 GiB", 24 * 2**30),
        ("16G", 16 * 10**9),
        ("800MB", 8 * 10**8),
        ("1.5TiB", 3 * 2**39),
        ("1000", 1000),
    ],
)
def test_sizes_are_read(text, size):
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24XB", "-1GB", "0GB", "24GB RAM", "nan", "1e3"])
def test_a_bad_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"--fit\n.*got: [\s\S]*such as 24GB"):
        read_bytes(text)


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (1.5e9, "1.5 GB"), (1e18, "1000 PB")],
)
def test_sizes_are_shown(size, shown):
    assert show_bytes(size) == shown


def test_counts_and_times_are_shown():
    assert [show_count(n) for n in (7, 1234, 6.74e9)] == ["7", "1.23 k", "6.74 G"]
    assert [show_seconds(s) for s in (0.012, 59.6, 3600, 86400 * 3)] == [
        "0.012 s", "60 s", "1 h", "3 days",
    ]  # fmt: skip
