"""The example with an NNX model: the adapter learns, and merges into a module."""

import argparse

import pytest


@pytest.mark.slow
def test_it_learns_and_the_merged_module_does_the_same(script, capsys):
    before, after = script.run(argparse.Namespace(steps=150))
    assert after < before / 3
    merged = float(capsys.readouterr().out.split(" after, ")[1].split(" merged")[0])
    assert merged < before / 2
