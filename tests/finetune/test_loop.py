import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora import LoraConfig, find_kernels, load_adapter, lora_init
from jax_lora.data.batches import Batches
from jax_lora.data.examples import Example
from jax_lora.errors import DataError
from jax_lora.finetune.loop import NonFiniteLossError, TrainLoop
from jax_lora.finetune.run_folder import RunFolder
from jax_lora.finetune.settings import TrainSettings
from jax_lora.report.progress import SilentReporter


@pytest.fixture(autouse=True)
def promotion():
    # Optax raises floats to its integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


def examples(learned=True):
    ids = np.random.default_rng(0).integers(1, 300, (8, 6), dtype=np.int32)
    return [Example(row, np.arange(6) >= (3 if learned else 6), n) for n, row in enumerate(ids, 1)]


class Recorder(SilentReporter):
    """Keeps the events; at one step it sends a signal."""

    def __init__(self, signal_at=None):
        self.events, self.signal_at = [], signal_at

    def stepped(self, step, loss):
        if step == self.signal_at:
            signal.raise_signal(signal.SIGINT)

    def compiling(self, length):
        self.events.append(("compiling", length))

    def trained(self, report):
        self.events.append(("trained", report.step))

    def validated(self, step, loss, seconds):
        self.events.append(("validated", step))

    def saved(self, step, path):
        self.events.append(("saved", step))


@pytest.fixture
def make_loop(tiny, tmp_path):
    model, variables = tiny
    kernels = find_kernels(model.apply, variables, jnp.zeros((1, 4), jnp.int32))

    def make(reporter=None, *, variables=variables, rows=None, folder="run", **settings):
        adapter = lora_init(jax.random.key(0), variables, LoraConfig(rank=2), kernels=kernels)
        chosen = {"iters": 6, "batch_size": 2, "steps_per_report": 2, "steps_per_eval": 3}
        options = TrainSettings(rank=2, learning_rate=0.01, **(chosen | settings))
        run, _ = RunFolder.prepare(tmp_path / folder)
        run.write_config(options.as_dict())
        return TrainLoop(
            model,
            variables,
            adapter,
            options,
            batches=Batches.of(rows or examples(), options.batch_size),
            validation=Batches.of(rows or examples(), 4),
            run=run,
            reporter=reporter or Recorder(),
        )

    return make


def test_a_run_compiles_once_a_shape_and_reports_validates_and_saves_when_asked(make_loop):
    recorder = Recorder()
    result = make_loop(recorder).train()
    assert recorder.events.count(("compiling", 8)) == 1
    assert [step for kind, step in recorder.events if kind == "trained"] == [2, 4, 6]
    assert [step for kind, step in recorder.events if kind == "validated"] == [3, 6]
    assert recorder.events[-1] == ("saved", 6)
    assert (result.steps, result.tokens, result.interrupted) == (6, 6 * 12, None)


def test_metrics_hold_every_report_and_validation(make_loop, tmp_path):
    result = make_loop().train()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines if "train_loss" in line] == [2, 4, 6]
    assert [line["val_loss"] for line in lines if "val_loss" in line][-1] == result.val_loss


def test_the_checkpoint_holds_the_adapter_alone_and_fits_the_base(make_loop, tiny):
    _, variables = tiny
    result = make_loop().train()
    adapter = load_adapter(result.checkpoint, base=variables)
    assert all(np.any(pair.b) for pair in adapter.pairs.values())


def test_a_signal_finishes_the_step_and_saves_it(make_loop):
    recorder = Recorder(signal_at=4)
    result = make_loop(recorder).train()
    assert (result.steps, result.interrupted) == (4, "SIGINT")
    assert result.checkpoint.name == "step-000004" and result.checkpoint.is_dir()


def test_the_same_seed_trains_the_same_adapter(make_loop, tiny):
    _, variables = tiny
    one, same = (
        load_adapter(make_loop(folder=name).train().checkpoint, base=variables)
        for name in ("one", "same")
    )
    jax.tree.map(np.testing.assert_array_equal, one, same)


def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing(make_loop, tiny, tmp_path):
    _, variables = tiny
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), variables)
    with pytest.raises(NonFiniteLossError, match=r"step 1, rows at lines \d, \d") as caught:
        make_loop(variables=broken).train()
    assert "Lower --learning-rate (now 0.01)" in str(caught.value)
    assert not list((tmp_path / "run").glob("step-*"))


def test_an_epoch_with_nothing_to_learn_is_an_error(make_loop):
    with pytest.raises(DataError, match="not one token to learn"):
        make_loop(rows=examples(learned=False)).train()
