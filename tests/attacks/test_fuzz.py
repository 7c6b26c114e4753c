"""Only errors of this library come out of a reader, whatever is in its files."""

import os

import pytest

from tests.attacks.fuzz import fuzz
from tests.attacks.readers import READERS

SECONDS = float(os.environ.get("JAX_LORA_FUZZ_SECONDS", "20"))  # of the slow test, for each reader


@pytest.fixture(autouse=True)
def parquet_needs_pyarrow(request):
    if "parquet" in request.node.name:
        pytest.importorskip("pyarrow")


@pytest.mark.parametrize("name", READERS)
def test_a_reader_survives_half_a_second_of_mutations(name):
    assert fuzz(name, seconds=0.5) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_reader_survives_many_mutations(name):
    assert fuzz(name, SECONDS, seed=1) > 0
