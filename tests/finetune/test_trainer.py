import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora import load_adapter
from jax_lora.data.batches import Batches
from jax_lora.data.examples import Example
from jax_lora.errors import DataError
from jax_lora.finetune.callbacks import Checkpoint, EarlyStop, Report, Validate
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.tasks import CAUSAL, loss_for, make_trainable
from jax_lora.finetune.trainer import NonFiniteLossError, Trainer
from jax_lora.models import load
from jax_lora.report.events import Reporter


@pytest.fixture(autouse=True)
def promotion():
    # Optax raises floats to its integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


def examples(learned=True):
    ids = np.random.default_rng(0).integers(1, 300, (8, 6), dtype=np.int32)
    return [Example(row, np.arange(6) >= (3 if learned else 6), n) for n, row in enumerate(ids, 1)]


class Recorder(Reporter):
    """Keeps the events; at one step it sends a signal."""

    def __init__(self, signal_at=None):
        self.events, self.signal_at = [], signal_at

    def stepped(self, step, loss):
        self.events.append(("stepped", step, loss))
        if step == self.signal_at:
            signal.raise_signal(signal.SIGINT)

    def compiling(self, what, number):
        self.events.append(("compiling", what, number))

    def validated(self, validation):
        self.events.append(("validated", validation.step, validation.samples))

    def saved(self, step, path):
        self.events.append(("saved", step))

    def of(self, kind):
        return [event[1:] for event in self.events if event[0] == kind]


@pytest.fixture
def log():
    """What the trainers of a test have logged."""
    return []


@pytest.fixture
def make_trainer(tiny, tmp_path, log):
    model, variables = tiny

    def make(
        reporter=None, *, variables=variables, rows=None, folder="run", resume=False, **settings
    ):
        chosen = {"iters": 6, "batch_size": 2, "steps_per_report": 2, "steps_per_eval": 3}
        options = TrainSettings(rank=2, **({"learning_rate": 0.01} | chosen | settings))
        own = jax.tree.map(jnp.array, variables)
        stop = options.early_stop
        return Trainer(
            loss_for(CAUSAL, model),
            own,
            make_trainable(CAUSAL, model, own, options),
            options.make_optimizer(options.iters),
            Batches.of(rows or examples(), options.batch_size),
            steps=options.iters,
            run=tmp_path / folder,
            resume=resume,
            callbacks=[
                Report(options.steps_per_report, reporter=reporter or Recorder(), log=log.append),
                Validate(Batches.of(rows or examples(), 4), options.steps_per_eval),
                *([] if stop is None else [EarlyStop(stop)]),
                Checkpoint(options.save_every, save_best=options.save_best),
            ],
        )

    return make


def without_times(rows):
    times = ("seconds", "per_second", "memory")
    return [{k: v for k, v in row.items() if not any(t in k for t in times)} for row in rows]


def test_a_run_compiles_once_per_shape_and_reports_validates_and_saves(make_trainer, log):
    recorder = Recorder()
    result = make_trainer(recorder).train()
    assert recorder.of("compiling") == [("sequences of up to 8 tokens", 1)]
    assert [row["iter"] for row in log if "train_loss" in row] == [2, 4, 6]
    assert [step for step, _ in recorder.of("validated")] == [3, 6]
    assert recorder.events[-1] == ("saved", 6)
    assert (result.steps, result.tokens, result.interrupted) == (6, 6 * 12, None)
    assert [row["val_loss"] for row in log if "val_loss" in row][-1] == result.val_loss


def test_the_checkpoint_has_only_the_adapter_and_fits_the_base(make_trainer, tiny):
    _, variables = tiny
    result = make_trainer().train()
    adapter = load_adapter(result.checkpoint, base=variables)
    assert all(np.any(pair.b) for pair in adapter.pairs.values())


@pytest.mark.slow  # a fast test of the command does it with LoRA
@pytest.mark.parametrize("kind", ["dora", "full"])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_run(make_trainer, log, kind):
    options = {"fine_tune_type": kind, "learning_rate": 3e-3, "save_every": 2}
    options |= {} if kind == "full" else {"dropout": 0.1}
    whole = Recorder()
    expected = make_trainer(whole, folder="whole", **options).train()
    expected_log, log[:] = list(log), []

    part = Recorder(signal_at=3)
    result = make_trainer(part, **options).train()
    assert (result.steps, result.interrupted) == (3, "SIGINT")
    assert result.checkpoint.name == "step-000003" and result.checkpoint.is_dir()
    rest = Recorder()
    resumed = make_trainer(rest, resume=True, **options).train()

    assert part.of("stepped") + rest.of("stepped") == whole.of("stepped")
    assert without_times(log) == without_times(expected_log)
    assert (resumed.tokens, resumed.val_loss) == (expected.tokens, expected.val_loss)
    for name in ("moments", "arrays-*"):
        for one, other in zip(
            *(sorted(each.checkpoint.glob(name)) for each in (expected, resumed)), strict=True
        ):
            assert_same_arrays(one, other)
    if kind == "full":
        files = [each.checkpoint / "model.safetensors" for each in (expected, resumed)]
        assert files[0].read_bytes() == files[1].read_bytes()


def assert_same_arrays(one, other):
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as reader:
        trees = [reader.restore(folder.absolute()) for folder in (one, other)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_full_fine_tuning_changes_every_kernel_and_saves_a_model(make_trainer, tiny):
    model, variables = tiny
    result = make_trainer(fine_tune_type="full").train()
    again, params = load(result.checkpoint)
    assert again.config == model.config
    changed = jax.tree.map(lambda old, new: bool(np.any(old != new)), variables["params"], params)
    assert all(jax.tree.leaves(changed))


def test_early_stopping_ends_a_run_without_improvement(make_trainer):
    # Without a learning rate worth the name no validation is better than the first.
    trainer = make_trainer(
        iters=40, steps_per_eval=2, early_stop=3, learning_rate=1e-30, optimizer="sgd"
    )
    result = trainer.train()
    assert (result.steps, result.best[1]) == (8, "step-000002")
    assert result.checkpoint.name == "step-000008"


def test_the_best_checkpoint_is_saved_unless_disabled(make_trainer, tmp_path):
    names = lambda folder: sorted(each.name for each in (tmp_path / folder).glob("step-*"))  # noqa: E731
    make_trainer(folder="yes", steps_per_eval=4).train()
    make_trainer(folder="no", steps_per_eval=4, save_best=False).train()
    assert names("yes") == ["step-000004", "step-000006"] and names("no") == ["step-000006"]


@pytest.mark.slow
def test_num_layers_limits_the_adapted_layers(make_trainer, tiny):
    _, variables = tiny
    result = make_trainer(num_layers=1, iters=2).train()
    for pair in load_adapter(result.checkpoint, base=variables).pairs.values():
        assert not np.any(pair.b[0]) and np.any(pair.b[1])


def test_the_same_seed_trains_the_same_adapter(make_trainer, tiny):
    _, variables = tiny
    one, same = (
        load_adapter(make_trainer(folder=name).train().checkpoint, base=variables)
        for name in ("one", "same")
    )
    jax.tree.map(np.testing.assert_array_equal, one, same)


def test_a_nan_loss_stops_the_run_and_saves_nothing(make_trainer, tiny, tmp_path):
    _, variables = tiny
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), variables)
    with pytest.raises(NonFiniteLossError, match=r"step 1, examples at lines \d, \d") as caught:
        make_trainer(variables=broken).train()
    assert "Lower the learning rate" in str(caught.value)
    assert not list((tmp_path / "run").glob("step-*"))


def test_an_epoch_without_targets_is_an_error(make_trainer):
    with pytest.raises(DataError, match="no target token"):
        make_trainer(rows=examples(learned=False)).train()


def test_the_next_step_starts_before_the_numbers_of_this_one_are_read(make_trainer, monkeypatch):
    order = []
    start, finish = Trainer._start, Trainer._finish

    def note_start(self, number, *rest):
        order.append(f"start {number}")
        return start(self, number, *rest)

    def note_finish(self, running):
        order.append(f"read {running.number}")
        finish(self, running)

    monkeypatch.setattr(Trainer, "_start", note_start)
    monkeypatch.setattr(Trainer, "_finish", note_finish)
    make_trainer(steps_per_eval=3, save_every=100).train()
    # Nothing starts behind step 2 until the validation after it, nor behind the last step.
    assert order == [
        *("start 0", "start 1", "read 0", "start 2", "read 1", "read 2"),
        *("start 3", "start 4", "read 3", "start 5", "read 4", "read 5"),
    ]
