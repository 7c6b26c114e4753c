"""Which rows a process reads, and what a process that is alone answers."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_lora.data.batches import Batches
from jax_lora.data.collators import MaskedCollator
from jax_lora.data.encoder_examples import TextExample
from jax_lora.data.examples import Example
from jax_lora.errors import ConfigError
from jax_lora.finetune import process_group as module
from jax_lora.finetune.batch_source import RowShare, as_source
from jax_lora.finetune.process_group import process_group
from jax_lora.storage.multihost import first_alone

IDS = [np.arange(n, dtype=np.int32) for n in (5, 9, 12, 20, 7, 3)]
EXAMPLES = [Example(ids, np.ones(len(ids), bool), 1) for ids in IDS]
TEXTS = [TextExample(ids, 0 * ids, ids < 0, 1, targets=2) for ids in IDS]


@pytest.mark.parametrize(
    ("examples", "options"),
    [(EXAMPLES, {}), (EXAMPLES, {"pack": 24}), (TEXTS, {"collate": MaskedCollator(1, 20)})],
)
def test_a_process_creates_its_rows_of_the_batch_of_one_process(examples, options):
    batches = Batches.of(examples, 4, seed=1, **options)
    for own in ([0, 1], [2, 3], [1, 3]):
        share = RowShare(batches, lambda rows, own=own: np.array(own))
        for step in range(2 * batches.per_epoch):
            for some, every in zip(share.at(step), batches.at(step), strict=True):
                assert (some is None) == (every is None)
                if every is not None:
                    np.testing.assert_array_equal(some, every[own])


def test_a_process_takes_its_rows_of_any_batch():
    source = as_source(lambda step: {"x": np.arange(8) + step, "y": np.ones((8, 2))})
    share = RowShare(source, lambda rows: np.arange(rows // 2, rows))
    batch = share.at(3)
    assert batch["x"].tolist() == [7, 8, 9, 10] and batch["y"].shape == (4, 2)


def test_the_rows_of_a_process_are_those_of_its_devices():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    assert module._rows_here(sharding, 6).tolist() == list(range(6))


def test_a_process_that_is_alone_asks_nobody():
    group, tree = process_group(), {"x": np.ones(2)}
    assert group.alone and group.writes
    assert group.own_rows(None, 4) is None
    assert group.gathered(tree) is tree and group.own_copy(tree) is tree
    assert group.first(lambda: 3) == first_alone(lambda: 3) == 3
    assert int(group.start_max(15)) == 15
    group.require_same({"the model": "any"})


def test_a_mesh_without_devices_of_every_process_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    group = process_group()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for given, got in ((None, "None"), (mesh, r"devices of the processes \[0\]")):
        with pytest.raises(ConfigError, match=got):
            group.check_mesh(given)


def test_values_that_differ_between_processes_are_named(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda *_: 3)
    differ = {"the data": [1], "the options": [1, 2]}
    monkeypatch.setattr(module.multihost, "unequal", lambda values: differ)
    with pytest.raises(ConfigError) as caught:
        process_group().require_same({"the data": "a", "the options": "b"})
    assert "the data: process 1 differs from process 0" in str(caught.value)
    assert "the options: processes 1, 2 differ from process 0" in str(caught.value)
