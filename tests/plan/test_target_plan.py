"""Plans for devices that are not here: figures, bounds, text, and what needs the compiler."""

import dataclasses
import importlib.util
import subprocess
import sys

import jax
import pytest

from jax_lora.errors import ConfigError, DoesNotFitError
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan import target_plan
from jax_lora.plan.accelerators import ACCELERATORS, parse_target
from jax_lora.plan.compiled_step import StepMemory
from jax_lora.plan.data_shapes import BatchShape, DataShapes
from jax_lora.plan.hlo_traffic import Collective
from jax_lora.plan.planned_model import plan_shape
from jax_lora.plan.target_plan import TargetPlan, attention_flops, plan_for_target
from jax_lora.plan.target_screen import target_lines
from jax_lora.plan.topology import abstract_devices, compiler_options

DATA = DataShapes("none", (BatchShape(4096, 4096, 1),))


def plan_of(target="h100:1", **changes):
    plan = TargetPlan(
        target=parse_target(target),
        remat="names",
        memory=StepMemory(16 * 10**9, 10**8, 10**8, 13 * 10**9, 1, 9.0),
        traffic=335.2e9,
        collectives={},
        matmul_flops=98.9e12,
        attention_flops=0.0,
        tokens=4096,
    )
    return dataclasses.replace(plan, **changes)


def test_the_slower_of_bandwidth_and_matmul_rate_bounds_the_speed():
    plan = plan_of()
    assert plan.memory_seconds == pytest.approx(0.1) == plan.matmul_seconds
    assert plan.tokens_per_second == pytest.approx(40960)
    assert plan_of(traffic=670.4e9).tokens_per_second == pytest.approx(20480)
    assert plan_of(attention_flops=98.9e12).tokens_per_second == pytest.approx(20480)


def test_a_step_fits_up_to_the_memory_of_the_device():
    memory = StepMemory(80 * 10**9 - 1, 0, 0, 1, 1, 0.0)
    assert plan_of(memory=memory).fits
    assert not plan_of(memory=dataclasses.replace(memory, temporary=2)).fits


def test_the_figures_as_plain_values_contain_the_bounds_and_collectives():
    plan = plan_of("h100:8", collectives={"all-gather": Collective(64, 7e9)})
    found = plan.as_dict()
    assert found["devices"] == 8 and found["peak"] == plan.memory.peak
    assert found["collectives"] == {"all-gather": {"count": 64, "bytes": 7e9}}
    assert found["tokens_per_second_bound"] == plan.tokens_per_second


def test_attention_counts_a_recomputed_forward_pass_twice():
    model = plan_shape("llama-3-8b", None)
    names, full = (attention_flops(model, 4096, 4096, remat) for remat in ("names", "full"))
    one = 32 * 2 * 4096 * 4096 * 4096 / 2  # layers; half of tokens x tokens x hidden size
    assert (names, full) == (7 * one, 9 * one)


@pytest.mark.parametrize("target", [f"{name}:1" for name in ACCELERATORS])
def test_the_text_of_a_plan_fits_80_columns(target):
    huge = StepMemory(999 * 10**9, 0, 0, 999 * 10**9, 1, 1.0)
    collectives = {"ragged-all-to-all": Collective(123456, 999e9)}
    plan = plan_of(
        target, memory=huge, collectives=collectives, attention_flops=1e15, matmul_flops=1e16
    )
    settings = TrainSettings(pack=True, batch_size=128, grad_accumulation_steps=64)
    lines = target_lines(plan_shape("mixtral-8x7b", None), settings, DATA, plan)
    assert max(map(len, lines)) <= 80
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "fits (36%)"),
        ({"memory": StepMemory(90 * 10**9, 0, 0, 0, 1, 0.0)}, "DOES NOT FIT (112%)"),
        ({"traffic": 1e12}, "bound by bandwidth"),
        ({"matmul_flops": 1e15}, "bound by matmul rate"),
        ({"attention_flops": 2e12}, "2.0 TFLOP (by formula)"),
        ({"collectives": {"all-reduce": Collective(3, 2e9)}}, "all-reduce         2 GB   in 3"),
    ],
)
def test_the_text_has_the_verdict_and_the_bound(changes, says):
    model = plan_shape("llama-3-8b", None)
    text = "\n".join(target_lines(model, TrainSettings(), DATA, plan_of(**changes)))
    assert says in text and "Data:" not in text
    assert ("attention kernels" in text) == ("attention_flops" in changes)


def test_the_text_says_what_was_assumed_of_the_data():
    data = dataclasses.replace(DATA, note="none, so every example counts as 8192 tokens")
    lines = target_lines(plan_shape("llama-3-8b", None), TrainSettings(), data, plan_of())
    assert lines[-1] == "Data: none, so every example counts as 8192 tokens."


@pytest.mark.parametrize(
    ("target", "package", "extra"),
    [("h100:1", "jax_cuda13_plugin", "aot-cuda"), ("v5e:1x1", "libtpu", "aot-tpu")],
)
def test_without_the_compiler_the_message_names_the_extra(target, package, extra):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError) as caught:
        abstract_devices(parse_target(target))
    message = str(caught.value)
    assert f"topology {target}" in message and f"no package {package}" in message
    assert f"pip install 'jax-lora[{extra}]'" in message and f"'.[{extra}]'" in message


def test_only_gpus_compile_without_autotuning():
    assert compiler_options(parse_target("a100:1"))["xla_gpu_autotune_level"] == "0"
    assert compiler_options(parse_target("v5p:1x1x1")) == {}


REFUSED = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (21.79G) exceeds available HBM (15.75G). HLO module: jit_update."
)


@pytest.mark.parametrize(
    ("remat", "message", "tried", "says"),
    [
        ("auto", REFUSED, ["names", "full"], "21.79GB"),
        ("names", REFUSED, ["names"], "at most 15.75GB a device"),
        ("full", "RESOURCE_EXHAUSTED: no memory", ["full"], "RESOURCE_EXHAUSTED: no memory"),
    ],
)
def test_a_step_that_the_compiler_refuses_is_tried_with_less_memory_and_explained(
    remat, message, tried, says, monkeypatch
):
    class Refused:
        jaxpr = None

        def lower(self):
            return self

        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(message)

    found = []

    def trace(model, settings, *, remat, **rest):
        found.append(remat)
        return Refused(), 1

    monkeypatch.setattr(target_plan, "trace_step", trace)
    monkeypatch.setattr(target_plan, "abstract_devices", lambda target: ())
    model, target = plan_shape("llama-3-8b", None), parse_target("v5e:1x1")
    with pytest.raises(DoesNotFitError) as caught:
        plan_for_target(model, TrainSettings(remat=remat), target, length=128, targets=128)
    text = str(caught.value)
    assert found == tried and says in text and "topology v5e:1x1" in text
    assert f"remat {tried[-1]!r}" in text and "fsdp=4" in text


_COMPILE = """
import jax
jax.config.update("jax_platforms", "cpu")
from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.accelerators import parse_target
from jax_lora.plan.planned_model import plan_config
from jax_lora.plan.target_plan import plan_for_target
from jax_lora.models import LlamaConfig
config = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
)
model = plan_config(config, "bfloat16", "toy")
settings = TrainSettings(batch_size=1, max_seq_length=256)
plan = plan_for_target(model, settings, parse_target("h100:1"), length=256, targets=256)
assert plan.remat == "names" and plan.fits and not plan.collectives
assert plan.attention_flops > 0, "no fused attention kernel"
weights = sum(leaf.size for leaf in jax.tree.leaves(model.variables))
assert 2 * 2 * weights < plan.traffic < 100 * weights, plan.traffic / weights
assert 4 * 256 * weights < plan.matmul_flops < 6 * 256 * weights, plan.matmul_flops / weights
"""


@pytest.mark.slow
def test_a_toy_model_is_compiled_for_a_gpu_that_is_not_here():
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the compiler is not installed")
    # In a process of its own, as the plugin stays loaded.
    subprocess.run([sys.executable, "-c", _COMPILE], check=True, timeout=300)
