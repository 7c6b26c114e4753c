import pytest

from jax_lora.errors import ConfigError
from jax_lora.finetune.schedule import make_schedule


@pytest.mark.parametrize(("shape", "last"), [("cosine", 0.0), ("linear", 0.0), ("constant", 2.0)])
def test_the_learning_rate_rises_to_its_peak_and_follows_the_shape(shape, last):
    rate = make_schedule(shape, 2.0, 100, warmup=0.1)
    values = [float(rate(step)) for step in range(101)]
    assert values[0] == 0.0 and values[10] == pytest.approx(2.0)
    assert max(values) == pytest.approx(2.0)
    assert values[100] == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_the_shortest_runs_have_a_schedule(iterations):
    rate = make_schedule("cosine", 1.0, iterations, warmup=0.5)
    assert all(0.0 <= float(rate(step)) <= 1.0 for step in range(iterations + 1))


def test_an_unknown_shape_is_refused():
    with pytest.raises(ConfigError, match="one of cosine, linear, constant"):
        make_schedule("round", 1.0, 10)
