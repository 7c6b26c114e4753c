import numpy as np
import pytest

from jax_lora.data.batches import Batches
from jax_lora.data.examples import Example
from jax_lora.finetune.batch_source import load_ahead

EXAMPLES = [
    Example(np.arange(n, dtype=np.int32), np.ones(n, bool), n) for n in (5, 9, 12, 20, 7, 3)
]


@pytest.mark.parametrize("pack", [None, 24])
@pytest.mark.parametrize("start", [0, 5])
def test_prefetching_gives_the_batch_of_each_step_from_any_start(pack, start):
    batches = Batches.of(EXAMPLES, 2, seed=1, pack=pack)
    loaded = list(load_ahead(batches, start, 11))
    assert len(loaded) == 11 - start
    for step, batch in enumerate(loaded, start=start):
        assert type(batch).__name__ == "Batch"
        for one, other in zip(batch, batches.at(step), strict=True):
            np.testing.assert_array_equal(one, other)


def test_prefetching_ends_after_the_last_step():
    assert list(load_ahead(Batches.of(EXAMPLES, 2), 4, 4)) == []


def test_an_error_while_creating_a_batch_is_raised(monkeypatch):
    def broken(self, step):
        raise ValueError(f"no batch {step}")

    monkeypatch.setattr(Batches, "at", broken)
    with pytest.raises(ValueError, match="no batch 0"):
        next(load_ahead(Batches.of(EXAMPLES, 2), 0, 3))
