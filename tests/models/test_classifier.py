"""Replace the head of an encoder by a classification head."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jax_lora.errors import ConfigError, ModelError
from jax_lora.models import add_classifier, load, save

FIXTURES = Path(__file__).parent.parent / "fixtures"
LABELS = ["bad", "good", "neither", "both"]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("kind", ["masked_lm", "classifier"])
def test_the_encoder_stays_and_the_head_is_new(family, kind, tmp_path):
    model, params = load(FIXTURES / family / kind)
    made, more = add_classifier(jax.random.key(0), model, params, LABELS)
    old, new = (flatten_dict(each, sep="/") for each in (params, more))
    shared = [path for path in new if path.startswith(("embeddings", "layers"))]
    assert shared and all(new[path] is old[path] for path in shared)
    heads = {path.split("/")[0] for path in new} - {"embeddings", "layers"}
    assert heads == ({"classifier"} if family == "roberta" else {"pooler", "classifier"})
    save(tmp_path, made, more)
    again, same = load(tmp_path)
    assert again.config.labels == tuple(LABELS)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), more, same))
    scores = jax.eval_shape(again.apply, {"params": same}, jnp.zeros((2, 3), jnp.int32))
    assert scores.shape == (2, 4)


def test_a_head_of_as_many_classes_is_made_anew_too():
    model, params = load(FIXTURES / "roberta" / "classifier")
    _, more = add_classifier(jax.random.key(0), model, params, LABELS[:3])
    kernels = [p["classifier"]["out_proj"]["kernel"] for p in (params, more)]
    assert kernels[0].shape == kernels[1].shape
    assert not np.array_equal(*kernels)


def test_berts_pooler_is_kept_where_there_is_one():
    model, params = load(FIXTURES / "bert" / "classifier")
    _, more = add_classifier(jax.random.key(0), model, params, LABELS)
    assert more["pooler"]["kernel"] is params["pooler"]["kernel"]


def test_a_decoder_is_refused():
    with pytest.raises(ModelError, match="got:      a GPT2"):
        add_classifier(jax.random.key(0), *load(FIXTURES / "gpt2" / "untied"), LABELS)


def test_no_labels_are_refused():
    model, params = load(FIXTURES / "roberta" / "masked_lm")
    with pytest.raises(ConfigError, match="RobertaConfig: labels"):
        add_classifier(jax.random.key(0), model, params, [])
