"""Only errors of this library come out of a reader, whatever is in its files."""

import os

import pytest

from tests.attacks.fuzz import fuzz
from tests.attacks.readers import READERS

SECONDS = float(os.environ.get("JAX_LORA_FUZZ_SECONDS", "20"))  # for each reader


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_reader_survives_mutations(name):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    assert fuzz(name, SECONDS, seed=1) > 0
