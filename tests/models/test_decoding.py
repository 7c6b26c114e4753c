import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import jax_lora as jl
from jax_lora.errors import ConfigError
from jax_lora.models import T5, T5Config, generate
from jax_lora.models.decoding import advance, begin
from tests.lora_cases import assert_close, merged_tree

FIXTURES = Path(__file__).parents[1] / "fixtures"
GREEDY = load_file(FIXTURES / "generation/greedy.safetensors")
IDS, MASK = GREEDY["input_ids"], GREEDY["attention_mask"]
NAMES = sorted(name.removesuffix("/ids") for name in GREEDY if name.endswith("/ids"))


@functools.cache
def load(name):
    return jl.models.load(FIXTURES / name)


@pytest.fixture
def llama():
    return load("llama/tied")


@pytest.mark.parametrize("name", NAMES)
def test_greedy_ids_are_those_of_transformers(name):
    model, params = load(name)
    end = int(GREEDY[f"{name}/eos"])
    ids, lengths = generate(model, params, IDS, MASK, max_new_tokens=8, eos_id=end)
    theirs = GREEDY[f"{name}/ids"]  # as wide as its longest row
    np.testing.assert_array_equal(ids[:, : theirs.shape[1]], theirs)
    answers = theirs[:, IDS.shape[1] :].tolist()
    expected = [row.index(end) + 1 if end in row else 8 for row in answers]
    assert lengths.tolist() == expected
    assert min(expected) < 8, "the end token has to be met"


def test_an_adapter_answers_as_when_it_is_merged(llama):
    model, params = llama
    variables = {"params": params}
    kernels = jl.find_kernels(model.apply, variables, IDS)
    config = jl.LoraConfig(rank=2, alpha=32.0, dtype=jnp.float32)
    init = functools.partial(jl.lora_init, config=config, kernels=kernels)
    adapter = jax.jit(init)(jax.random.key(0), variables)
    adapter = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), adapter)
    options = {"max_new_tokens": 8, "eos_id": ()}
    base, _ = generate(model, variables, IDS, MASK, **options)
    formed = jax.jit(merged_tree)(variables, adapter)
    assert_close(jax.jit(jl.merge)(variables, adapter), formed, 1e-5)
    merged, _ = generate(model, formed, IDS, MASK, **options)
    beside, _ = generate(model, jl.combine(variables, adapter), IDS, MASK, **options)
    np.testing.assert_array_equal(beside, merged)
    assert (merged != base).any()


def test_other_prompts_and_settings_of_the_same_shape_compile_nothing(llama):
    model, params = llama
    generate(model, params, IDS, MASK, max_new_tokens=8)
    before = advance._cache_size()
    generate(model, params, IDS[::-1], MASK[::-1], max_new_tokens=8, eos_id=(3, 4))
    assert advance._cache_size() == before
    key = jax.random.key(0)
    for number, (temperature, top_k, top_p) in enumerate(
        [(1.0, None, None), (0.5, 3, None), (2.0, None, 0.9), (0.1, 7, 0.1)]
    ):
        key = jax.random.fold_in(key, number)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "key": key}
        generate(model, params, IDS, MASK, max_new_tokens=8, **settings)
        before = before if number else advance._cache_size()
    assert advance._cache_size() == before


def sample(llama, ids, mask, **settings):
    model, params = llama
    settings = {"temperature": 1.5, "eos_id": (), **settings}
    ids, _ = generate(model, params, ids, mask, max_new_tokens=8, **settings)
    return np.asarray(ids)[:, -8:]


def test_samples_of_a_sequence_depend_only_on_its_key(llama):
    keys = jax.random.split(jax.random.key(3), 4)
    together = sample(llama, IDS, MASK, key=keys)
    others = np.roll(IDS, 7) % 32
    others[1] = IDS[1]
    np.testing.assert_array_equal(sample(llama, others, MASK, key=keys)[1], together[1])
    # Alone, and in another bucket.
    wide = [np.pad(each[2:3], ((0, 0), (3, 0))) for each in (IDS, MASK)]
    np.testing.assert_array_equal(sample(llama, *wide, key=keys[2:3])[0], together[2])


def test_equal_prompts_get_different_answers_and_a_seed_repeats_them(llama):
    ids, mask = np.tile(IDS[:1], (4, 1)), np.tile(MASK[:1], (4, 1))
    drawn = sample(llama, ids, mask, key=jax.random.key(0))
    assert len({tuple(row) for row in drawn.tolist()}) == 4
    np.testing.assert_array_equal(sample(llama, ids, mask, key=jax.random.key(0)), drawn)
    np.testing.assert_array_equal(sample(llama, ids, mask, key=jax.random.PRNGKey(0)), drawn)
    assert (sample(llama, ids, mask, key=jax.random.key(1)) != drawn).any()


def test_top_1_sampling_equals_greedy_decoding(llama):
    greedy = sample(llama, IDS, MASK, temperature=0.0)
    key = jax.random.key(0)
    np.testing.assert_array_equal(sample(llama, IDS, MASK, top_k=1, key=key), greedy)
    np.testing.assert_array_equal(sample(llama, IDS, MASK, top_p=1e-6, key=key), greedy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "generate: max_new_tokens"),
        ({"temperature": -1.0}, "generate: temperature"),
        ({"temperature": float("nan")}, "generate: temperature"),
        ({"top_k": 0}, "generate: top_k"),
        ({"top_k": 1.5}, "generate: top_k"),
        ({"top_p": 0.0}, "generate: top_p"),
        ({"top_p": 1.5}, "generate: top_p"),
        ({"temperature": 1.0}, "generate: key"),
        ({"temperature": 1.0, "key": jax.random.split(jax.random.key(0), 3)}, "one key, or 4"),
        ({"eos_id": 32}, "a token, 0 to 31"),
        ({"input_ids": IDS[0]}, "generate: input_ids"),
        ({"input_ids": IDS * 1.0}, "generate: input_ids"),
        ({"attention_mask": MASK[:, 1:]}, "generate: attention_mask"),
        ({"attention_mask": MASK[:, ::-1]}, "pad prompts on the left"),
    ],
)
def test_invalid_settings_are_refused(llama, changes, message):
    given = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 2, **changes}
    with pytest.raises(ConfigError, match=message):
        generate(*llama, **given)


def test_a_table_of_positions_is_used_to_its_end_and_no_further():
    model, params = load("gpt2/tied")
    ids = np.tile(IDS, (1, 2))[:1, : model.config.n_positions - 3]
    _, lengths = generate(model, params, ids, max_new_tokens=4, eos_id=())
    assert lengths.tolist() == [4]
    with pytest.raises(ConfigError, match=r"13 \+ 5 tokens"):
        generate(model, params, ids, max_new_tokens=5)


@pytest.mark.parametrize("model", [nn.Dense(4), T5(T5Config(vocab_size=8, d_model=8))])
def test_a_model_without_a_decoders_cache_is_refused(llama, model):
    with pytest.raises(ConfigError, match="a decoder, which has a cache"):
        begin(model, {"params": llama[1]}, (1, 2), 3)


def test_parameters_that_lie_on_several_devices_give_the_same_tokens():
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(path, shape):
        split = path.endswith(("q_proj/kernel", "up_proj/kernel"))
        return NamedSharding(mesh, P(None, None, "tensor") if split else P())

    model, params = jl.models.load(FIXTURES / "llama/tied", sharding=place)
    end = int(GREEDY["llama/tied/eos"])
    ids, _ = generate(model, params, IDS, MASK, max_new_tokens=8, eos_id=end)
    np.testing.assert_array_equal(ids, GREEDY["llama/tied/ids"])


def test_bfloat16_parameters_stay_bfloat16(llama):
    model, params = llama
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), params)
    ids, _ = generate(model, params, IDS, MASK, max_new_tokens=2, eos_id=())
    logits = jax.jit(model.apply)({"params": params}, IDS, MASK)
    np.testing.assert_array_equal(ids[:, IDS.shape[1]], logits[:, -1].argmax(-1))
    assert begin(model, {"params": params}, (1, 2), 3).cache.keys.dtype == jnp.bfloat16
