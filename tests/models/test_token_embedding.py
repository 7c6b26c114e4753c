"""An embedding that is also the output head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.data.collators import Batch
from jax_lora.finetune.losses import causal_lm_loss
from jax_lora.models import Llama
from jax_lora.models.token_embedding import TokenEmbedding
from tests.tiny_model import TINY


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_flax(shape, dtype):
    hidden = jax.random.normal(jax.random.key(0), shape, dtype)
    table = {"params": {"embedding": jax.random.normal(jax.random.key(1), (5, 8), dtype)}}
    ours, flax = (
        kind(5, 8, param_dtype=dtype).apply(table, hidden, method="attend")
        for kind in (TokenEmbedding, nn.Embed)
    )
    assert ours.dtype == flax.dtype
    rounding = 1e-6 if dtype == "float32" else 0.05
    np.testing.assert_allclose(
        ours.astype(jnp.float32), flax.astype(jnp.float32), rtol=rounding, atol=rounding
    )


def test_a_loss_in_chunks_holds_no_transposed_table():
    model = Llama(TINY)
    assert TINY.tie_word_embeddings
    ids = jnp.zeros((2, 8), jnp.int32)
    variables = model.init(jax.random.key(0), ids)
    batch = Batch(ids, ids, ids, jnp.ones((2, 8), jnp.float32))
    hidden = lambda table: causal_lm_loss(model, table, batch, chunk=4)[0]  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(hidden))(variables))
    assert f"f32[{TINY.hidden_size},{TINY.vocab_size}]" not in program
