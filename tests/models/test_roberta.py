"""Features of RoBERTa only: positions are counted from the padding token."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.errors import ConfigError
from jax_lora.models import RobertaConfig, load

FIXTURE = Path(__file__).parent.parent / "fixtures" / "roberta" / "classifier"


def test_positions_count_from_behind_the_padding_token():
    model, params = load(FIXTURE)
    ids = jnp.array([[5, 6, 7, 8], [1, 1, 5, 6], [5, 6, 1, 1], [5, 1, 6, 1]])
    positions = model.apply({"params": params}, ids, method="positions")
    expected = [[2, 3, 4, 5], [1, 1, 2, 3], [2, 3, 1, 1], [2, 1, 3, 1]]
    np.testing.assert_array_equal(positions, expected)


@pytest.mark.parametrize("token", [None, -1, 32, True])
def test_an_invalid_padding_token_is_refused(token):
    with pytest.raises(ConfigError, match="RobertaConfig: pad_token_id") as caught:
        RobertaConfig(vocab_size=32, pad_token_id=token)
    assert "a token, from 0 to 31" in str(caught.value)


def test_kernels_have_hugging_faces_names():
    names = load(FIXTURE)[0].hf_names
    assert names["layers/attention/query/kernel"] == (
        "roberta.encoder.layer.{layer}.attention.self.query"
    )
    assert names["classifier/out_proj/kernel"] == "classifier.out_proj"
    assert load(FIXTURE.parent / "masked_lm")[0].hf_names["lm_head/dense/kernel"] == "lm_head.dense"
