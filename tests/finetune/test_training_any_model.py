"""`Trainer` with a custom model, loss, and batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.errors import CheckpointError, ConfigError, DataError, StructureError
from jax_lora.finetune import Callback, Checkpoint, EarlyStop, Trainer, Validate


@pytest.fixture(autouse=True)
def promotion():
    # Optax raises floats to its integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


def loss_fn(variables, batch):
    hidden = jnp.tanh(batch["x"] @ variables["first"])
    error = hidden @ variables["second"] - batch["y"]  # (examples, out)
    return jnp.sum(error**2), jnp.float32(error.shape[0])


def make_variables():
    draw = np.random.default_rng(0)
    return {
        "first": jnp.asarray(draw.normal(size=(6, 5)), jnp.float32),
        "second": jnp.asarray(draw.normal(size=(5, 3)), jnp.float32),
    }


def make_batches(count=4):
    draw = np.random.default_rng(1)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)  # noqa: E731
    return [{"x": normal(8, 6), "y": normal(8, 3)} for _ in range(count)]


def make_adapter(variables, **settings):
    x = jax.ShapeDtypeStruct((8, 6), jnp.float32)
    forward = lambda tree, x: jnp.tanh(x @ tree["first"]) @ tree["second"]  # noqa: E731
    kernels = jl.find_kernels(forward, variables, x)
    config = jl.LoraConfig(rank=2, targets=["first", "second"], **settings)
    return jl.lora_init(jax.random.key(0), variables, config, kernels=kernels)


def trainer(batches, adapter="new", *, callbacks=(), dropout=0.0, **options):
    variables = make_variables()
    if adapter == "new":
        adapter = make_adapter(variables, dropout=dropout)
    return Trainer(
        loss_fn, variables, adapter, optax.adam(0.02), batches, callbacks=callbacks, **options
    )


class KillAt(Callback):
    """Fails at a step, as a killed process would, after earlier callbacks have saved."""

    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, loss):
        if trainer.step == self.step:
            raise KeyboardInterrupt


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


KINDS = {
    "list": lambda: make_batches(),
    "function": lambda: lambda step: make_batches()[step % 4],
    "stream": lambda: (each for _ in range(3) for each in make_batches()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["new", None], ids=["adapter", "all variables"])
def test_a_killed_and_resumed_run_equals_one_without_interruption_to_the_bit(
    kind, adapter, tmp_path
):
    options = {"steps": 10, "adapter": adapter, "dropout": 0.5}
    whole = trainer(KINDS[kind](), **options)
    assert whole.train().steps == 10

    run, save = tmp_path / "run", Checkpoint(every=3)
    with pytest.raises(KeyboardInterrupt):
        trainer(KINDS[kind](), run=run, callbacks=[save, KillAt(8)], **options).train()
    again = trainer(KINDS[kind](), run=run, resume=True, callbacks=[save], **options)
    assert again.step == 6
    again.train()
    assert bits(again.adapter) == bits(whole.adapter)


def test_every_kind_of_batches_trains_alike():
    trained = [trainer(make(), steps=10) for make in KINDS.values()]
    for each in trained:
        each.train()
    assert bits(trained[0].adapter) == bits(trained[1].adapter) == bits(trained[2].adapter)


def test_the_base_model_is_not_changed_and_the_loss_falls():
    batches = make_batches()
    one = trainer(batches, steps=40)
    before = one.evaluate(batches)
    one.train()
    base, adapter = jl.partition(one.variables)
    assert bits(base) == bits(make_variables())
    assert one.evaluate(batches) < 0.8 * before
    assert bits(adapter) == bits(one.adapter)


def test_without_a_number_of_steps_a_list_is_one_epoch():
    assert trainer(make_batches(3)).train().steps == 3


def test_accumulation_makes_the_update_of_the_whole_batch():
    one, other = trainer(make_batches(), steps=2), trainer(make_batches(), steps=2, accumulation=4)
    one.train()
    other.train()
    for a, b in zip(jax.tree.leaves(one.adapter), jax.tree.leaves(other.adapter), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_a_run_is_an_adapter_that_loads(tmp_path):
    one = trainer(make_batches(), steps=2, run=tmp_path / "run", callbacks=[Checkpoint()])
    result = one.train()
    found = jl.load_adapter(result.checkpoint, base=make_variables())
    assert bits(found) == bits(one.adapter)


def test_an_earlier_run_is_moved_aside_unless_it_is_resumed(tmp_path):
    run = tmp_path / "run"
    trainer(make_batches(), steps=2, run=run, callbacks=[Checkpoint()]).train()
    trainer(make_batches(), steps=1, run=run, callbacks=[Checkpoint()]).train()
    assert (tmp_path / "run.1" / "step-000002").is_dir()
    assert [each.name for each in run.glob("step-*")] == ["step-000001"]


def test_early_stopping_ends_the_run_and_the_best_checkpoint_stays(tmp_path):
    # Validation batches that training moves away from.
    opposite = [{"x": each["x"], "y": -each["y"]} for each in make_batches()]
    callbacks = [Validate(opposite, every=2), EarlyStop(3), Checkpoint(every=100, keep=1)]
    run = tmp_path / "run"
    result = trainer(make_batches(), steps=200, run=run, callbacks=callbacks).train()
    assert result.stopped_early and result.steps < 200
    assert result.best is not None and (run / result.best[1]).is_dir()


def test_a_callback_can_stop_the_run_and_sees_every_step():
    seen = []

    class Stop(Callback):
        def on_step(self, trainer, loss):
            seen.append((trainer.step, loss))
            if trainer.step == 3:
                trainer.stop()

    assert trainer(make_batches(), steps=9, callbacks=[Stop()]).train().steps == 3
    assert [step for step, _ in seen] == [1, 2, 3] and all(np.isfinite(x) for _, x in seen)


def test_another_batch_shape_is_compiled_once_more():
    small = [{name: array[:4] for name, array in each.items()} for each in make_batches()]
    one = trainer([*make_batches(2), *small[:2]], steps=8)
    assert one.train().programs == 2


def test_a_custom_training_loop_gives_the_result_of_the_trainer():
    variables, batches = make_variables(), make_batches()
    optimizer = optax.adam(0.02)
    step = jl.finetune.make_step(loss_fn, optimizer)
    state = jl.finetune.init_state(make_adapter(variables), optimizer)
    for batch in batches:
        state, report = step(state, variables, batch)
    one = trainer(batches)
    one.train()
    assert bits(state.trainable) == bits(one.adapter) and float(report.weight) == 8.0


def test_a_weight_below_one_divides_the_loss():
    optimizer, variables = optax.sgd(0.1), make_variables()
    halved = lambda tree, batch: (loss_fn(tree, batch)[0], jnp.float32(0.5))  # noqa: E731
    step = jl.finetune.make_step(halved, optimizer)
    state = jl.finetune.init_state(make_adapter(variables), optimizer)
    batch = make_batches(1)[0]
    _, report = step(state, variables, batch)
    expected = float(loss_fn(variables, batch)[0]) / 0.5
    np.testing.assert_allclose(float(report.loss), expected, rtol=1e-5)


# Errors


def test_batches_without_a_length_need_a_number_of_steps():
    with pytest.raises(ConfigError, match="these batches have no length"):
        trainer(lambda step: make_batches()[0])
    with pytest.raises(ConfigError, match="an integer of at least 1"):
        trainer(make_batches(), steps=0)


@pytest.mark.parametrize("batches", [[], 3, None])
def test_other_types_of_batches_are_refused(batches):
    with pytest.raises(StructureError, match="a sequence of batches, a function"):
        trainer(batches, steps=3)


def test_the_error_for_a_short_stream_has_the_number_of_batches():
    with pytest.raises(DataError, match="ended after 4 batches"):
        trainer(iter(make_batches()), steps=6).train()


def test_an_iterator_of_validation_batches_is_refused():
    with pytest.raises(StructureError, match=r"Pass list\(batches\)"):
        Validate(iter(make_batches()))


def test_a_combined_tree_instead_of_an_adapter_is_refused():
    variables = make_variables()
    combined = jl.combine(variables, make_adapter(variables))
    with pytest.raises(StructureError, match=r"jl\.partition splits"):
        trainer(make_batches(), adapter=combined)


def test_a_nan_loss_names_the_batch_and_keeps_earlier_checkpoints(tmp_path):
    batches = make_batches()
    batches[2]["y"][0, 0] = np.nan
    run = tmp_path / "run"
    with pytest.raises(jl.finetune.NonFiniteLossError, match="step 3, batch 2"):
        trainer(batches, run=run, callbacks=[Checkpoint(every=1)]).train()
    assert sorted(each.name for each in run.glob("step-*")) == ["step-000001", "step-000002"]


def test_resuming_with_another_base_or_optimizer_is_refused(tmp_path):
    run = tmp_path / "run"
    trainer(make_batches(), steps=2, run=run, callbacks=[Checkpoint()]).train()
    variables = make_variables()
    adapter = make_adapter(variables)
    other = jax.tree.map(lambda leaf: leaf + 1, variables)
    options = {"steps": 4, "run": run, "resume": True, "callbacks": []}
    with pytest.raises(CheckpointError):
        Trainer(loss_fn, other, adapter, optax.adam(0.02), make_batches(), **options)
    with pytest.raises(CheckpointError):
        Trainer(loss_fn, variables, adapter, optax.sgd(0.02), make_batches(), **options)


def test_resuming_from_a_path_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run with a checkpoint there"):
        trainer(make_batches(), run=tmp_path / "run", resume=tmp_path / "absent")
    fresh = trainer(make_batches(), run=tmp_path / "run", resume="auto")
    assert fresh.train().steps == 4
