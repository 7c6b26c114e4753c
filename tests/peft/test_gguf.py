"""Adapters for llama.cpp, read by the specification of the file, and by the gguf package.

The last test but one runs where `gguf` is installed beside the package: pip install gguf
"""

import dataclasses
import struct

import jax
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import AdapterFileError, ConfigError
from jax_lora.models import Bert, BertConfig, Gemma2, Gemma2Config
from jax_lora.peft.factors import split
from jax_lora.peft.gguf import ARCHITECTURES, GGUF
from jax_lora.peft.save import adapted_leaves

from .peft_cases import load_case


class Reader:
    """A GGUF file by its specification: metadata, tensors, and the rules about offsets."""

    def __init__(self, path):
        self.data, self.at = path.read_bytes(), 0
        magic, version, tensors, entries = self.take("<4sIQQ")
        assert (magic, version) == (b"GGUF", 3)
        self.metadata = {self.text(): self.value() for _ in range(entries)}
        found = [(self.text(), self.axes(), *self.take("<IQ")) for _ in range(tensors)]
        self.at += -self.at % 32
        self.tensors, end = {}, 0
        for name, shape, kind, offset in found:
            assert (kind, offset) == (0, end) and len(name) < 64
            size = int(np.prod(shape))
            self.tensors[name] = np.frombuffer(
                self.data, "<f4", size, offset=self.at + offset
            ).reshape(shape)
            end = offset + 4 * size
            end += -end % 32
        assert self.at + end == len(self.data)

    def take(self, form):
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def text(self):
        (size,) = self.take("<Q")
        return self.take(f"<{size}s")[0].decode()

    def value(self):
        (kind,) = self.take("<I")
        return self.text() if kind == 8 else {6: lambda: self.take("<f")[0]}[kind]()

    def axes(self):
        (count,) = self.take("<I")
        return self.take(f"<{count}Q")[::-1]  # the fastest axis is first in the file


def updates_in(reader):
    """The updates (out, in) by tensor name, computed as llama.cpp does."""
    alpha, updates = reader.metadata["adapter.lora.alpha"], {}
    for name in reader.tensors:
        if name.endswith(".lora_a"):
            stem = name.removesuffix(".lora_a")
            a, b = reader.tensors[name], reader.tensors[f"{stem}.lora_b"]
            if stem == "token_embd.weight":
                a = a.T
            updates[stem] = alpha / b.shape[-1] * b @ a
    return updates


def updates_of(adapter, model):
    """The updates (out, in) by module name."""
    adapter = jax.tree.map(np.asarray, adapter)
    updates = {}
    for leaf in adapted_leaves(adapter, model.hf_names).values():
        for module, each in split(adapter.pairs[leaf.path], leaf).items():
            product = each.a.astype(np.float32) @ each.b.astype(np.float32)
            updates[module] = each.scale * product.swapaxes(-1, -2)
    return updates


def in_order_of_transformers(update, heads):
    """Undo the order of rows that llama.cpp's architecture `llama` has for queries and keys."""
    rows = update.reshape(heads, -1, 2, update.shape[-1]).swapaxes(1, 2)
    return rows.reshape(update.shape)


@pytest.mark.parametrize("case", ["patterns", "all_linear_rslora"])
def test_the_update_of_every_tensor_is_that_of_the_adapter(case, tmp_path):
    model, _, adapter = load_case(case)
    jl.peft.save_gguf(tmp_path, adapter, model=model)
    reader = Reader(tmp_path / GGUF)
    assert reader.metadata.pop("adapter.lora.alpha") > 0
    assert reader.metadata == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
    }
    found, expected = updates_in(Reader(tmp_path / GGUF)), updates_of(adapter, model)
    assert len(found) == len(expected)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    names = {"o_proj": "attn_output", "lm_head": "output"}
    for module, update in expected.items():
        last = module.split(".")[-1]
        stem = last.removesuffix("_proj")
        name = names.get(last, f"attn_{stem}" if stem in "qkv" else f"ffn_{stem}")
        layer = f"blk.{module.split('.')[2]}." if "layers" in module else ""
        ours = found[f"{layer}{name}.weight"]
        if last in heads:
            assert not np.allclose(ours, update, atol=1e-3)
            ours = in_order_of_transformers(ours, heads[last])
        np.testing.assert_allclose(ours, update, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("experts", {"mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps")}),
        ("fused", {"mlp.gate_up_proj": ("ffn_up",), "self_attn.qkv_proj": ("attn_qkv",)}),
        ("conv1d", {"attn.c_attn": ("attn_qkv",)}),
    ],
)
def test_experts_and_fused_weights_have_llama_cpps_names(case, names, tmp_path):
    model, _, adapter = load_case(case)
    jl.peft.save_gguf(tmp_path, adapter, model=model)
    found, expected = updates_in(Reader(tmp_path / GGUF)), updates_of(adapter, model)
    for module, tensors in names.items():
        update = next(each for name, each in expected.items() if f".0.{module}" in name)
        ours = np.concatenate([found[f"blk.0.{name}.weight"] for name in tensors], axis=-2)
        np.testing.assert_allclose(ours, update, atol=1e-6, rtol=1e-5)


def test_the_table_of_an_untied_model_is_adapted_and_that_of_a_tied_model_is_not(tmp_path):
    model, _, adapter = load_case("embedding")
    jl.peft.save_gguf(tmp_path, adapter, model=model)
    ours = updates_in(Reader(tmp_path / GGUF))["token_embd.weight"]
    update = updates_of(adapter, model)["model.embed_tokens"]
    np.testing.assert_allclose(ours, update, atol=1e-6, rtol=1e-5)
    model, _, adapter = load_case("tied_both")
    with pytest.raises(AdapterFileError, match="model.embed_tokens: also the output head"):
        jl.peft.save_gguf(tmp_path / "out", adapter, model=model)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("dora", "a magnitude"),
        ("lora_bias", "a bias of B"),
        ("whole", "params/lm_head/kernel: a fully trained leaf"),
        ("tokens", "trained rows"),
    ],
)
def test_an_adapter_that_llama_cpp_does_not_support_is_refused_with_the_reason(
    case, reason, tmp_path
):
    model, _, adapter = load_case(case)
    with pytest.raises(AdapterFileError, match="jax-lora fuse") as caught:
        jl.peft.save_gguf(tmp_path / "out", adapter, model=model)
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_architecture_or_a_weight_without_a_name_is_refused(tmp_path):
    _, _, adapter = load_case("plain")
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    with pytest.raises(ConfigError, match="a model of type bert"):
        jl.peft.save_gguf(tmp_path, adapter, model=Bert(BertConfig(**sizes)))
    model, _, adapter = load_case("conv1d")
    pair = jl.LoraPair(np.ones((8, 1)), np.ones((1, 16)), in_axes=(0,), out_axes=(1,))
    adapter = dataclasses.replace(adapter, pairs={"wpe/embedding": pair})
    with pytest.raises(AdapterFileError, match="transformer.wpe: llama.cpp does not adapt"):
        jl.peft.save_gguf(tmp_path, adapter, model=model)


def test_a_zero_scale_stays_zero_and_a_nan_is_refused(tmp_path):
    model, _, adapter = load_case("plain")
    pairs = {path: dataclasses.replace(each, scale=0.0) for path, each in adapter.pairs.items()}
    jl.peft.save_gguf(tmp_path, dataclasses.replace(adapter, pairs=pairs), model=model)
    assert not any(each.any() for each in updates_in(Reader(tmp_path / GGUF)).values())
    before = (tmp_path / GGUF).read_bytes()
    pairs = {p: dataclasses.replace(x, b=x.b * np.nan) for p, x in adapter.pairs.items()}
    with pytest.raises(AdapterFileError, match="NaN or Inf"):
        jl.peft.save_gguf(tmp_path, dataclasses.replace(adapter, pairs=pairs), model=model)
    assert (tmp_path / GGUF).read_bytes() == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["experts", "router", "embedding", "fused", "conv1d"])
def test_the_gguf_package_reads_the_file_and_has_its_names(case, tmp_path):
    gguf = pytest.importorskip("gguf")
    model, _, adapter = load_case(case)
    jl.peft.save_gguf(tmp_path, adapter, model=model)
    ours, theirs = Reader(tmp_path / GGUF), gguf.GGUFReader(tmp_path / GGUF)
    assert theirs.fields["general.architecture"].contents() in ARCHITECTURES.values()
    assert theirs.fields["adapter.lora.alpha"].contents() == ours.metadata["adapter.lora.alpha"]
    kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = kind[ours.metadata["general.architecture"]]
    names = gguf.get_tensor_name_map(arch, 8)
    known = {f"{tensor}.weight" for _, tensor in names.mapping.values()}
    assert {name.rpartition(".")[0] for name in ours.tensors} <= known
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(tensor.data, ours.tensors[tensor.name])


def test_only_the_llama_architecture_has_another_order_of_rows(tmp_path):
    config = Gemma2Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4
    )
    model = Gemma2(dataclasses.replace(config, num_attention_heads=2, num_key_value_heads=1))
    b = np.arange(8, dtype=np.float32).reshape(1, 1, 8)
    pair = jl.LoraPair(
        np.ones((1, 8, 1), np.float32), b, in_axes=(1,), out_axes=(2,), stack_axes=(0,), scale=1.0
    )
    path = "params/layers/attn/q_proj/kernel"
    adapter = jl.Adapter({path: pair}, {}, jl.LoraConfig(rank=1, targets=["q_proj"]))
    jl.peft.save_gguf(tmp_path, adapter, model=model)
    found = Reader(tmp_path / GGUF).tensors["blk.0.attn_q.weight.lora_b"]
    np.testing.assert_array_equal(found[:, 0], b.ravel())
