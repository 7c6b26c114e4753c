import pytest

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.compiled_step import step_memory
from jax_lora.plan.fit_remat import fit_remat


@pytest.mark.slow
def test_whole_layers_are_recomputed_only_if_the_step_does_not_fit(planned):
    settings = TrainSettings(rank=4, batch_size=1, attention="flash")
    shape = {"length": 64, "targets": 8}
    names = step_memory(planned, settings, remat="names", **shape)
    assert names is not None
    assert fit_remat(planned, settings, names.peak, **shape) == "names"
    assert fit_remat(planned, settings, names.peak - 1, **shape) == "full"
