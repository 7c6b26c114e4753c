"""The example that adapts to a codebase: what is held out, what is measured, that it learns."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.bundled import model_path
from jax_lora.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """Forty small files in the style of one author."""
    folder = tmp_path_factory.mktemp("code")
    for number in range(40):
        text = f"def zorp_{number}(quux):\n    return quux.zorp(blarg={number}).frob()\n"
        (folder / f"zorp_{number}.py").write_text(text * 2)
    (folder / "picture.bin").write_bytes(b"\0\1\2")
    return folder


def test_a_file_is_learned_or_held_out_and_never_both(script, code):
    learned, held_out = ({row.fields["file"] for row in part.rows} for part in script.split(code))
    assert len(learned) == 36 and len(held_out) == 2  # two more are for validation
    assert not learned & held_out and "picture.bin" not in learned | held_out
    assert [part.digest for part in script.split(code)] == [
        part.digest for part in script.split(code)
    ]


def test_no_more_is_measured_than_is_said(script, code, monkeypatch):
    _, held_out = script.split(code)
    sizes = [(code / row.fields["file"]).stat().st_size for row in held_out.rows]
    assert script.measured(held_out)[1] == sum(sizes)
    monkeypatch.setattr(script, "MEASURED", sizes[0])
    sample, size = script.measured(held_out)
    assert len(sample.rows) == 1 and size == sizes[0]


@pytest.mark.slow
def test_it_learns_and_what_it_measures_is_the_mean_of_the_files(script, code, tmp_path):
    before, after = script.run(code, model_path(), steps=8, rank=4, out=tmp_path / "adapter")
    assert after.perplexity < before.perplexity / 2
    model, params = jl.models.load(model_path(), dtype="float32")
    adapter = jl.load_adapter(tmp_path / "adapter", base={"params": params})
    for weights, score in (
        ({"params": params}, before),
        (jl.merge({"params": params}, adapter), after),
    ):
        nats, tokens, size = by_file(model, weights, script.split(code)[1])
        np.testing.assert_allclose(score.perplexity, math.exp(nats / tokens), rtol=1e-4)
        np.testing.assert_allclose(score.bits_per_byte, nats / math.log(2) / size, rtol=1e-4)


def by_file(model, variables, held_out):
    """Sum the files' nats, one file at a time: packing must make no difference."""
    tokenizer, nats, tokens, size = Tokenizer.load(model_path()), 0.0, 0, 0
    for row in held_out.rows:
        ids = jnp.asarray([[*tokenizer.encode(row.fields["text"]), 0]], jnp.int32)  # with its end
        losses = jax.nn.log_softmax(model.apply(variables, ids)[0, :-1])
        nats -= float(jnp.take_along_axis(losses, ids[0, 1:, None], axis=-1).sum())
        tokens, size = tokens + ids.shape[1] - 1, size + len(row.fields["text"].encode())
    return nats, tokens, size


def test_a_folder_without_text_is_a_message(script, tmp_path):
    with pytest.raises(SystemExit, match="without texts"):
        script.main([str(tmp_path)])
