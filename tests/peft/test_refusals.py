"""An adapter that does not fit raises one error that lists all problems."""

import json
import shutil
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_lora as jl
from jax_lora.errors import AdapterFileError, AdapterFileWarning, ConfigError, StructureError

from .peft_cases import FOLDERS, base_of, load_case

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base():
    return base_of("plain")


@pytest.fixture
def folder(tmp_path):
    """A copy of an adapter that a test may spoil."""
    return shutil.copytree(FOLDERS / "plain", tmp_path / "adapter")


def refusal(base, folder) -> str:
    model, variables = base
    with pytest.raises(AdapterFileError) as caught:
        jl.peft.load(folder, variables, names=model.hf_names)
    return str(caught.value)


def spoil(folder, **tensors):
    """Replace tensors; None removes one."""
    have = load_file(folder / WEIGHTS) | tensors
    kept = {name: tensor for name, tensor in have.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def change(folder, **fields):
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


def test_one_message_lists_all_problems_of_the_tensors(base, folder):
    spoil(
        folder,
        **{
            f"{Q0}.lora_A.weight": None,
            f"{Q0}.lora_B.weight": np.zeros((3, 4), np.float32),
            "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": np.ones(
                (4, 16), np.float32
            ),
            "base_model.model.model.layers.0.self_attn.q_prj.weight": np.ones((2,), np.float32),
            "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight": None,
            "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight": None,
        },
    )
    message = refusal(base, folder)
    assert "missing: model.layers.0.self_attn.q_proj.lora_A.weight" in message
    assert "extra: model.layers.7.self_attn.q_proj.lora_A.weight (4, 16)" in message
    assert "extra: model.layers.0.self_attn.q_prj.weight (2,); the closest modules are" in message
    assert "model.layers.0.self_attn.q_proj" in message
    assert "missing: model.layers.1.self_attn.v_proj.lora_A.weight, which" in message


def test_a_wrong_shape_is_reported_with_the_expected_one(base, folder):
    spoil(folder, **{f"{Q0}.lora_B.weight": np.zeros((31, 4), np.float32)})
    wrong = "wrong shape: model.layers.0.self_attn.q_proj.lora_B.weight is (31, 4)"
    assert f"{wrong}, expected (32, 4)" in refusal(base, folder)


def test_numbers_that_are_not_finite_are_named(base, folder):
    spoil(folder, **{f"{Q0}.lora_A.weight": np.full((4, 16), np.nan, np.float32)})
    assert f"{Q0}.lora_A.weight: 64 elements are NaN or Inf" in refusal(base, folder)


def test_integer_tensors_are_refused(base, folder):
    spoil(folder, **{f"{Q0}.lora_A.weight": np.ones((4, 16), np.int8)})
    assert f"{Q0}.lora_A.weight: type I8" in refusal(base, folder)


def test_a_folder_with_only_a_pickle_is_refused_without_opening_it(base, folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    (folder / "adapter_model.bin").chmod(0)
    message = refusal(base, folder)
    assert "only pickle files, adapter_model.bin, which can execute code" in message


def test_an_absent_folder_and_an_empty_one_raise_clear_errors(base, tmp_path):
    assert "no such folder" in refusal(base, tmp_path / "nowhere")
    assert f"no {WEIGHTS}" in refusal(base, tmp_path)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 1000])
def test_a_truncated_file_raises_one_clear_error(base, folder, size):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:size])
    assert "a damaged file" in refusal(base, folder)


@pytest.mark.parametrize(
    "header",
    [
        (1 << 63).to_bytes(8, "little") + b"{}",
        (100 << 20).to_bytes(8, "little") + b"{}",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}',
    ],
)
def test_a_false_header_raises_one_clear_error(base, folder, header):
    sized = header if header[:1] != b"{" else len(header).to_bytes(8, "little") + header + b"\0" * 8
    (folder / WEIGHTS).write_bytes(sized)
    assert "a damaged file" in refusal(base, folder)


def test_a_link_out_of_the_folder_is_refused(base, folder, tmp_path):
    (folder / WEIGHTS).rename(tmp_path / "outside.safetensors")
    (folder / WEIGHTS).symlink_to(tmp_path / "outside.safetensors")
    assert "a link to" in refusal(base, folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3': only 'LORA'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = [1]: not implemented"),
        ({"use_qalora": True}, "use_qalora = True: not implemented"),
        ({"velora_config": {"x": 1}}, "velora_config = {'x': 1}: not implemented"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "it also changes the base model"),
        ({"r": 10**9}, "r = 1000000000: expected an integer from 1 to 65536"),
        ({"r": 0}, "r = 0: expected an integer"),
        ({"rank_pattern": {"q_proj": "four"}}, "rank_pattern.q_proj = 'four'"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x': expected a finite number"),
        ({"lora_dropout": 2}, "lora_dropout = 2: expected a number from 0 to below 1"),
        ({"bias": "some"}, "bias = 'some'"),
        ({"use_dora": "yes"}, "use_dora = 'yes': expected true or false"),
        ({"target_modules": [1]}, "target_modules.0 = 1: expected a name"),
        ({"layer_replication": 3}, "layer_replication = 3: expected a list of"),
        ({"layer_replication": [[0, "2"]]}, "layer_replication.0.1 = '2': expected an integer"),
        ({"layer_replication": [[2, 1]]}, "layer_replication = [[2, 1]]: expected a list of"),
        (
            {"layer_replication": [[0, 10**9]]},
            "layer_replication.0.1 = 1000000000: expected an integer",
        ),
    ],
)
def test_an_unimplemented_setting_raises_an_error_that_names_it(base, folder, fields, message):
    change(folder, **fields)
    assert message in refusal(base, folder)


def test_one_message_lists_all_unimplemented_settings(base, folder):
    change(folder, peft_type="X", use_qalora=True, r=-1)
    message = refusal(base, folder)
    assert all(part in message for part in ("peft_type", "use_qalora", "r = -1"))


@pytest.mark.parametrize("text", ["{", "[]", '{"r": NaN}', '{"a": 1, "a": 2}', "[" * 100_000])
def test_a_hostile_configuration_raises_one_clear_error(base, folder, text):
    (folder / CONFIG).write_text(text)
    assert "expected: a JSON object" in refusal(base, folder)


def test_fields_of_another_version_are_left_out_with_a_warning(base, folder):
    change(folder, shiny_new_setting=1)
    model, variables = base
    with pytest.warns(AdapterFileWarning, match="shiny_new_setting"):
        jl.peft.load(folder, variables, names=model.hf_names)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", ".*.*.*.*.*q", "a" * 400, "(?:a|a)+", "["])
def test_a_pattern_that_could_take_for_ever_is_never_matched(base, folder, pattern):
    change(folder, alpha_pattern={pattern: 3})
    start = time.monotonic()
    assert "alpha_pattern" in refusal(base, folder)
    assert time.monotonic() - start < 5  # seconds; matching "(a+)+$" takes years


def test_a_regular_expression_of_targets_is_never_compiled(base, folder):
    change(folder, target_modules="(a+)+$")
    model, variables = base
    adapter = jl.peft.load(folder, variables, names=model.hf_names)
    assert sorted(adapter.pairs) == [
        f"params/layers/attn/{name}/kernel" for name in ("q_proj", "v_proj")
    ]


LOAD_MODEL = "jl.peft.load_model(path, model, params)"


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("tied_embedding", "model.embed_tokens: factors that change only the embedding"),
        ("head", "lm_head.lora_A.weight: changes only the head"),
        ("tied_whole_lookup", "model.embed_tokens.weight: changes only the embedding"),
        ("tied_whole_ends", "lm_head.weight: differs from model.embed_tokens.weight"),
        ("whole", "lm_head.weight: differs from model.embed_tokens.weight"),
    ],
)
def test_an_adapter_of_one_end_of_a_tied_table_asks_for_an_untied_model(case, reason):
    base = jl.models.load(FOLDERS.parent / "llama" / "tied")
    message = refusal(base, FOLDERS / case)
    assert f"{reason}, and the model is tied; {LOAD_MODEL} unties it" in message
    assert "fix:      Load the base model" in message
    assert f"model, params, adapter = {LOAD_MODEL}." in message


def test_factors_of_a_tied_head_that_are_not_the_tables_are_refused(tmp_path):
    base = jl.models.load(FOLDERS.parent / "llama" / "tied")
    folder = shutil.copytree(FOLDERS / "tied_both", tmp_path / "adapter")
    head = "base_model.model.lm_head"
    spoil(
        folder,
        **{
            f"{head}.lora_B.weight": load_file(folder / WEIGHTS)[f"{head}.lora_B.weight"] + 1,
            f"{head}.surprise": np.ones((2, 3), np.float32),
        },
    )
    message = refusal(base, folder)
    assert (
        "lm_head.lora_B.weight: differs from the factors of the table, and the model is" in message
    )
    assert "extra: lm_head.surprise (2, 3)" in message


def test_a_resized_vocabulary_asks_for_a_resized_model(base):
    message = refusal(base, FOLDERS / "resized")
    assert f"{LOAD_MODEL} resizes the vocabulary to 35 tokens" in message


def test_repeated_layers_ask_for_a_model_that_repeats_them(base):
    message = refusal(base, FOLDERS / "replication")
    assert f"[[0, 2], [1, 2]]: the base has 2 layers; {LOAD_MODEL} repeats them" in message


def test_a_copy_of_the_base_that_is_not_the_base_is_noticed():
    model, variables = base_of("embedding")
    table = variables["params"]["embed_tokens"]["embedding"]
    params = {**variables["params"], "embed_tokens": {"embedding": table + 1}}
    message = refusal((model, params), FOLDERS / "embedding")
    assert "differs from the base: the adapter is for a different base model" in message


def test_names_of_another_model_are_refused(base):
    model, variables = base
    with pytest.raises(StructureError, match="no such leaf in the parameters"):
        jl.peft.load(FOLDERS / "plain", variables, names={"layers/attn/q_prj/kernel": "x"})
    _, _, adapter = load_case("plain")
    with pytest.raises(StructureError, match="not in names; the closest paths are"):
        jl.peft.save("unused", adapter, names={"layers/attn/k_proj/kernel": "k"})


def test_saving_nan_or_inf_writes_nothing(base, tmp_path):
    model, _ = base
    _, _, adapter = load_case("plain")
    broken = jax.tree.map(lambda leaf: leaf * np.float32("nan"), adapter)
    with pytest.raises(AdapterFileError, match="NaN or Inf in base_model.model"):
        jl.peft.save(tmp_path / "out", broken, names=model.hf_names)
    assert not (tmp_path / "out").exists()


def test_saving_to_an_unwritable_folder_raises_a_clear_error(base, tmp_path):
    model, _ = base
    _, _, adapter = load_case("plain")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterFileError, match="a place that can be written to"):
        jl.peft.save(tmp_path / "file", adapter, names=model.hf_names)


def test_an_unknown_target_is_refused(base, tmp_path):
    model, _ = base
    _, _, adapter = load_case("plain")
    with pytest.raises(ConfigError, match="None or 'vllm'"):
        jl.peft.save(tmp_path, adapter, names=model.hf_names, target="vlm")
