"""The peak memory of loading is the model and one of its layers."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.models import Llama, LlamaConfig, save

MB = 2**20
LARGE = LlamaConfig(
    vocab_size=64,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=64,
)
# Prints how far the process's own memory (without the pages of mapped files) grew while loading,
# and how large the parameters are.
LOAD = """
import re, sys, threading, time
import jax, jax.numpy as jnp
from jax_lora.models import load

def own_bytes():
    text = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", text)[1]) * 1024

def watch():
    while not done.is_set():
        peaks.append(own_bytes())
        time.sleep(0.002)

quantize = sys.argv[2] or None
# Once before: imports and compiled programs are no part of the model.
load(sys.argv[1], quantize=quantize)
peaks, done = [], threading.Event()
before = own_bytes()
thread = threading.Thread(target=watch)
thread.start()
_, params = load(sys.argv[1], quantize=quantize)
jax.block_until_ready(params)
done.set()
thread.join()
print(max(peaks) - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
@pytest.mark.parametrize("quantize", ["", "nf4"])
def test_loading_needs_no_more_than_the_model_and_one_layer(tmp_path, quantize):
    model = Llama(LARGE)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    save(tmp_path, model, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes))
    command = [sys.executable, "-c", LOAD, str(tmp_path), quantize]
    # With a fixed threshold glibc gives what is freed back at once.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "XLA_FLAGS": ""}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    grown, size = map(int, output.split())
    full = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    assert full > 150 * MB and size < (full / 4 if quantize else full + 1)
    layer = full / LARGE.num_hidden_layers
    assert grown < size + layer + 8 * MB, (grown / MB, size / MB)
