import itertools

import numpy as np
import pytest

from jax_lora.data.batches import Batches, choose_buckets
from jax_lora.data.examples import Example


def example(length, learned=2, line=1):
    marks = np.zeros(length, bool)
    marks[length - learned :] = True
    return Example(np.arange(length, dtype=np.int32), marks, line)


EXAMPLES = [example(n, line=n) for n in (5, 6, 7, 8, 9, 20, 21, 22, 40, 41)]


def test_a_row_is_padded_on_the_right_and_its_labels_are_the_next_tokens():
    batch = Batches.of([example(5, learned=3)], 2).at(0)
    assert batch.ids.shape == (2, 8)
    assert batch.ids[0].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert batch.at[0, :3].tolist() == [1, 2, 3]
    assert batch.labels[0, :3].tolist() == [2, 3, 4]
    assert batch.weights.sum(axis=1).tolist() == [3.0, 0.0]


def test_the_first_token_is_never_a_label():
    marks = np.ones(4, bool)
    batch = Batches.of([Example(np.arange(4, dtype=np.int32), marks, 1)], 1).at(0)
    assert batch.weights.sum() == 3


@pytest.mark.parametrize("seed", [0, 7])
def test_an_epoch_has_every_example_once(seed):
    batches = Batches.of(EXAMPLES, 3, seed=seed)
    for epoch in range(2):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        lines = [line for step in steps for line in batches.lines(step)]
        assert sorted(lines) == sorted(each.line for each in EXAMPLES)


def test_the_order_depends_only_on_the_seed_and_the_step():
    one, same = Batches.of(EXAMPLES, 3, seed=1), Batches.of(EXAMPLES, 3, seed=1)
    for step in (9, 3, 0, 3):
        np.testing.assert_array_equal(one.at(step).ids, same.at(step).ids)
    epoch = lambda batches, number: [  # noqa: E731
        batches.lines(number * batches.per_epoch + step) for step in range(batches.per_epoch)
    ]
    assert epoch(one, 0) != epoch(one, 1)
    assert epoch(one, 0) != epoch(Batches.of(EXAMPLES, 3, seed=2), 0)


def test_few_shapes_have_the_least_padding():
    def padded(lengths):
        return sum(min(n for n in lengths if n >= len(each.ids)) for each in EXAMPLES)

    chosen = [bucket.length for bucket in choose_buckets(EXAMPLES, 3)]
    possible = itertools.combinations(range(8, 48, 8), 2)
    assert padded(chosen) == min(padded((*pair, 48)) for pair in possible)
    shapes = {Batches.of(EXAMPLES, 2).at(step).ids.shape for step in range(20)}
    assert len(shapes) == 3


def test_buckets_of_many_lengths_have_every_example():
    many = [example(n) for n in range(3, 4000, 3)]
    buckets = choose_buckets(many, 3)
    assert len(buckets) == 3 and buckets[-1].length >= 3999


def test_validation_has_every_example_once_in_order():
    batches = Batches.of(EXAMPLES, 3)
    assert sum(batch.weights.sum() for batch in batches.once()) == 2 * len(EXAMPLES)


def test_tokens_are_counted_without_padding():
    batches = Batches.of(EXAMPLES, 3)
    counted = sum(batches.tokens(step) for step in range(batches.per_epoch))
    assert counted == sum(len(each.ids) for each in EXAMPLES)


class TestPacking:
    @pytest.fixture
    def batches(self):
        return Batches.of(EXAMPLES, 2, seed=3, pack=48)

    def test_every_example_is_packed_once_per_epoch(self, batches):
        for epoch in range(2):
            steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
            lines = [line for step in steps for line in batches.lines(step)]
            assert sorted(lines) == sorted(each.line for each in EXAMPLES)

    def test_rows_have_one_length_and_little_padding(self, batches):
        shapes = {batches.at(step).ids.shape for step in range(2 * batches.per_epoch)}
        assert shapes == {(2, 48)}
        assert batches.padding < 0.1 < Batches.of(EXAMPLES, 2, buckets=1).padding

    def test_positions_restart_and_segments_count_at_every_example(self, batches):
        for batch in batches.once():
            for ids, positions, segments in zip(
                batch.ids, batch.positions, batch.segments, strict=True
            ):
                real = segments > 0
                # These examples count from 0, as positions do.
                np.testing.assert_array_equal(ids[real], positions[real])
                assert (np.diff(segments[real]) == (positions[real][1:] == 0)).all()
                assert not ids[~real].any()

    def test_the_first_token_of_an_example_is_never_a_label(self, batches):
        for batch in batches.once():
            for row in range(2):
                at = batch.at[row][batch.weights[row] > 0]
                assert (batch.segments[row][at] == batch.segments[row][at + 1]).all()
                np.testing.assert_array_equal(
                    batch.labels[row][batch.weights[row] > 0], batch.ids[row][at + 1]
                )

    def test_packing_keeps_the_number_of_labels(self, batches):
        learned = sum(batch.weights.sum() for batch in batches.once())
        assert learned == sum(batch.weights.sum() for batch in Batches.of(EXAMPLES, 2).once())

    def test_the_order_depends_only_on_the_seed_and_the_step(self, batches):
        same = Batches.of(EXAMPLES, 2, seed=3, pack=48)
        for step in (3, 0, 7):
            for one, other in zip(batches.at(step), same.at(step), strict=True):
                np.testing.assert_array_equal(one, other)

    def test_a_row_is_never_shorter_than_the_longest_example(self):
        assert Batches.of(EXAMPLES, 2, pack=10).at(0).ids.shape == (2, 48)
