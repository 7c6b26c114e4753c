"""Training on meshes of eight devices: the same losses and gradients as on one, and few gathers."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.data.collators import Batch, MaskedBatch, Seq2SeqBatch
from jax_lora.errors import ConfigError
from jax_lora.finetune.callbacks import Callback
from jax_lora.finetune.devices import make_mesh, mesh_sizes, split_rows
from jax_lora.finetune.losses import causal_lm_loss, masked_lm_loss, seq2seq_loss
from jax_lora.finetune.state_sharding import state_shardings
from jax_lora.finetune.step import init_state, make_step
from jax_lora.finetune.trainer import Trainer
from jax_lora.models import (
    T5,
    Bert,
    BertConfig,
    Llama,
    LlamaConfig,
    Mixtral,
    MixtralConfig,
    T5Config,
)
from jax_lora.models.mesh_sharding import mesh_sharding
from jax_lora.paths import flatten_with_paths
from jax_lora.plan.hlo_traffic import _Module as Module
from tests.tiny_model import random_params

VOCABULARY = 192
DECODER = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
MIXTURE = MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
)
ENCODER = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=16,
)
ENCODER_DECODER = T5Config(
    vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4
)
MODELS = {
    "decoder": (Llama(DECODER), causal_lm_loss),
    "mixture": (Mixtral(MIXTURE), causal_lm_loss),
    "encoder": (Bert(ENCODER), masked_lm_loss),
    "encoder-decoder": (T5(ENCODER_DECODER), seq2seq_loss),
}
# Every mesh with the decoder, and the other models where they have code of their own: experts that
# are gathered or stay apart, a head with a bias, and two stacks of layers.
PLACES = [
    ("decoder", "data=8"),
    ("decoder", "fsdp=8"),
    ("decoder", "data=2,fsdp=4"),
    ("decoder", "fsdp=4,tensor=2"),
    ("decoder", "data=2,tensor=2,expert=2"),
    ("mixture", "fsdp=8"),
    ("mixture", "data=2,tensor=2,expert=2"),
    ("encoder", "data=2,fsdp=4"),
    ("encoder-decoder", "fsdp=4,tensor=2"),
]
FAST = {("decoder", "fsdp=8")}  # compiled once for the two tests that use it


@pytest.fixture(autouse=True)
def promotion():
    # Optax raises floats to its integer step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


def batch_of(loss, targets=4):
    rows, length = 8, 8
    draw = np.random.default_rng(0)
    ids = draw.integers(1, VOCABULARY, (rows, length), dtype=np.int32)
    labels = draw.integers(1, VOCABULARY, (rows, targets), dtype=np.int32)
    at = np.tile(np.arange(targets, dtype=np.int32), (rows, 1))
    weights = (np.arange(targets) < draw.integers(1, 5, (rows, 1))).astype(np.float32)
    if loss is causal_lm_loss:
        return Batch(ids, at, labels, weights)
    mask = np.ones_like(ids)
    if loss is masked_lm_loss:
        return MaskedBatch(ids, mask, np.zeros_like(ids), at, labels, weights)
    return Seq2SeqBatch(ids, mask, labels, labels, weights)


@functools.cache
def base(name):
    model, _ = MODELS[name]
    # Larger weights than at the start of training, so that tokens differ. T5's scores have no
    # scale: with its initial weights, float32 rounding changes gradients by more than 1e-5.
    factor = 0.3 if name == "encoder-decoder" else 4
    params = random_params(model)
    params = jax.tree.map(lambda leaf: leaf * factor if leaf.ndim > 1 else leaf, params)
    variables = {"params": params}
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    kernels = jl.find_kernels(model.apply, variables, ids)
    adapter = jl.lora_init(jax.random.key(1), variables, jl.LoraConfig(rank=2), kernels=kernels)
    draw = np.random.default_rng(3)  # b is not zero, so that every gradient is tested
    return variables, jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) * 0.1, jnp.float32), adapter
    )


def mesh_of(text):
    sizes = mesh_sizes(text)
    count = math.prod(sizes.values())
    return make_mesh(text, 8, jax.devices()[:count])


def placed(variables, mesh):
    named, treedef = flatten_with_paths(variables)
    place = mesh_sharding(mesh)
    shardings = [place(path, leaf.shape) for path, leaf in named]
    return jax.device_put(variables, jax.tree.unflatten(treedef, shardings))


@functools.cache
def measured(name, mesh=None, targets=4):
    """The compiled loss and gradient of a model, and its arguments."""
    mesh = None if mesh is None else mesh_of(mesh)
    model, loss = MODELS[name]
    variables, adapter = base(name)
    batch = batch_of(loss, targets)
    if mesh is not None:
        variables = placed(variables, mesh)
        adapter = jax.device_put(adapter, jl.adapter_shardings(variables, adapter))
        batch = split_rows(batch, mesh)
    of = functools.partial(loss, model.clone(mesh=mesh), chunk=16)

    def mean(adapter, variables, batch):
        total, weight = jl.lora_apply(of)(jl.combine(variables, adapter), batch)
        return total / weight

    arguments = adapter, variables, batch
    return jax.jit(jax.value_and_grad(mean)).lower(*arguments).compile(), arguments


@functools.cache
def expected(name):
    compiled, arguments = measured(name)
    return compiled(*arguments)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=[] if (name, mesh) in FAST else pytest.mark.slow)
        for name, mesh in PLACES
    ],
)
def test_losses_and_gradients_are_those_of_one_device(name, mesh):
    compiled, arguments = measured(name, mesh)
    loss, gradient = compiled(*arguments)
    want_loss, want_gradient = expected(name)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want_gradient))
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * largest)


# -----------------------------------------------------------------------------------------------
# Collectives
# -----------------------------------------------------------------------------------------------


def gathered(compiled):
    """Count how often an array of each shape is gathered."""
    counts = collections.Counter()
    for _, operation, count in Module(compiled.as_text()).operations():
        if operation.kind.removesuffix("-start") == "all-gather":
            for dims in re.findall(r"f32\[([\d,]*)\]", operation.result):
                counts[tuple(map(int, dims.split(",")))] += count
    return counts


@pytest.mark.parametrize(("targets", "head"), [(4, 0), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_a_kernel_is_gathered_once_a_pass_and_the_head_at_most_once_a_step(targets, head):
    """For few tokens, the devices share the vocabulary, and the head is not gathered at all."""
    compiled, _ = measured("decoder", "fsdp=8", targets)
    hidden, inner, keys = 32, 64, 16
    passes = 2 * DECODER.num_hidden_layers  # forward and backward
    found = gathered(compiled)
    assert found[hidden, inner] == 2 * passes  # gate and up
    assert found[inner, hidden] == passes  # down
    assert found[hidden, hidden] == 2 * passes  # queries and output
    assert found[hidden, keys] == 2 * passes
    assert found[hidden, VOCABULARY] == head  # although the loss has several chunks
    assert found[VOCABULARY, hidden] <= 1, found


# -----------------------------------------------------------------------------------------------
# Training
# -----------------------------------------------------------------------------------------------


def test_the_second_step_is_not_compiled_again_and_the_optimizer_state_is_sharded():
    mesh, optimizer = mesh_of("fsdp=4,tensor=2"), optax.adam(0.01)
    model, loss = MODELS["decoder"]
    variables, adapter = base("decoder")
    variables = placed(variables, mesh)
    shardings = jl.adapter_shardings(variables, adapter)
    state = init_state(jax.device_put(adapter, shardings), optimizer)
    shardings = state_shardings(state, shardings, mesh)
    of = functools.partial(loss, model.clone(mesh=mesh))
    step = make_step(of, optimizer, state_shardings=shardings)
    state, batch = jax.device_put(state, shardings), split_rows(batch_of(loss), mesh)
    for _ in range(3):
        state, _ = step(state, variables, batch)
    assert step._cache_size() == 1
    path = "params/layers/attn/q_proj/kernel"
    moment = state.opt_state[0].mu.pairs[path]  # (2, 32, 2) and (2, 2, 32)
    assert {each.data.shape for each in moment.a.addressable_shards} == {(2, 8, 2)}
    assert {each.data.shape for each in moment.b.addressable_shards} == {(2, 2, 16)}
    assert state.step.sharding.is_fully_replicated


def trainer_of(mesh, steps, *, adapter=True, **options):
    """A trainer of the decoder until a step, on a mesh or on one device, and its losses."""
    model, loss = MODELS["decoder"]
    variables, start = base("decoder")
    mesh = None if mesh is None else mesh_of(mesh)
    variables = variables if mesh is None else placed(variables, mesh)
    losses = []

    class Losses(Callback):
        def on_step(self, trainer, loss):
            losses.append(loss)

    trainer = Trainer(
        functools.partial(loss, model.clone(mesh=mesh)),
        variables,
        start if adapter else None,
        optax.sgd(0.01, momentum=0.9),
        [batch_of(loss)],
        steps=steps,
        callbacks=[Losses()],
        mesh=mesh,
        **options,
    )
    return trainer, losses


def trained(*arguments, **options):
    trainer, losses = trainer_of(*arguments, **options)
    trainer.train()
    return losses, trainer.adapter


@functools.cache
def whole_run(adapter):
    """Four steps on one device."""
    return trained(None, 4, adapter=adapter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("meshes", "adapter"),
    [
        ((None, "data=2,fsdp=4"), True),
        (("data=2,fsdp=4", "fsdp=4,tensor=2"), True),
        (("fsdp=8", None), False),
    ],
)
def test_a_checkpoint_is_resumed_on_another_mesh(tmp_path, meshes, adapter):
    first, second = meshes
    losses, _ = trained(first, 2, adapter=adapter, run=tmp_path)
    more, resumed = trained(second, 4, adapter=adapter, run=tmp_path, resume=True)
    whole, expected = whole_run(adapter)
    np.testing.assert_allclose([*losses, *more], whole, rtol=1e-5)
    leaves = zip(jax.tree.leaves(resumed), jax.tree.leaves(expected), strict=True)
    for got, want in leaves:
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_without_shardings_on_the_mesh_the_model_is_replicated():
    trainer, _ = trainer_of("data=8", 1)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(trainer.variables))


# -----------------------------------------------------------------------------------------------
# Sizes
# -----------------------------------------------------------------------------------------------


def test_the_axes_of_a_mesh_have_one_order():
    mesh = make_mesh("tensor=2, data=4", 8)
    assert mesh.axis_names == ("data", "tensor") and mesh.size == 8
    assert make_mesh("auto", 3) is None


@pytest.mark.parametrize(
    ("text", "got", "expected"),
    [
        ("model=8", "'model=8'", "some of data, fsdp, tensor, expert, each once"),
        ("data=2,data=4", "'data=4'", "each once"),
        ("fsdp=0", "'fsdp=0'", "a size of at least 1"),
        ("fsdp=two", "'fsdp=two'", "a size of at least 1"),
        ("fsdp", "'fsdp'", "a size of at least 1"),
        ("", "''", "a size of at least 1"),
        ("data=2,fsdp=2", "4 devices", "8, the number of devices here"),
        ("data=8,fsdp=2", "16 devices", "8, the number of devices here"),
        ("fsdp=8", "4 examples", "a multiple of 8, because data and fsdp share the examples"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(text, got, expected):
    with pytest.raises(ConfigError) as caught:
        make_mesh(text, 4)
    message = str(caught.value)
    assert got in message and expected in message and "fix:" in message.lower()
