"""The example with a loop of one's own: a stop changes nothing."""

import argparse

import jax
import numpy as np
import pytest


@pytest.mark.slow
def test_a_loop_that_was_stopped_ends_in_the_same_bits(script, tmp_path, capsys):
    whole, parts = script.run(argparse.Namespace(steps=120), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert "the same bits: True" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter.json").is_file()
