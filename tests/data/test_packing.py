from hypothesis import given
from hypothesis import strategies as st

from jax_lora.data.packing import pack_rows, speedup


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_every_example_is_packed_and_no_row_overflows(lengths):
    rows = pack_rows(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    # Two rows that would fit into one are never left apart, so at most one is half empty.
    half_empty = [row for row in rows if sum(lengths[index] for index in row) <= 32]
    assert len(half_empty) <= 1


def test_the_speedup_is_the_ratio_of_the_tokens():
    assert speedup([4, 4, 4, 4], padded=4 * 16, room=16) == 4.0
