"""Strict settings for every test: they find whole classes of faults by themselves.

Mixed dtypes do not promote (a bfloat16 model never turns into float32 unseen), ranks do not
broadcast by accident, and eight devices are there on any machine, so that sharding is tested.
"""

import importlib.metadata
import os
from pathlib import Path

# Read when JAX first looks for devices, so they are set before anything imports it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The command keeps compiled programs, in the user's own folder; tests are not to leave any.
os.environ["JAX_LORA_NO_CACHE"] = "1"
# Most of a test's time is compilation, and many tests compile the same function. JAX's own cache
# is kept for the next run; `make clean` deletes it. The key of an entry is the function itself, so
# that a change is compiled again. Each process of a run has a folder of its own: JAX would lock a
# shared one and, to limit its size, look at every file in it before it adds another.
caches = Path(__file__).parents[1] / ".pytest_cache" / "xla"
if os.environ.get("JAX_COMPILATION_CACHE_DIR", str(caches)).startswith(str(caches)):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")  # it inherits main's environment
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(caches / worker)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tests compile much and compute little. XLA's newer emitters and the passes of its backend make
# programs faster, and round some values differently; without them, tests take half the time.
# `make test-newest` runs some with them. A flag that is unknown ends the process: jaxlib 0.12 has
# no other emitters.
quick = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    quick.append("--xla_cpu_use_fusion_emitters=false")
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if os.environ.get("JAX_LORA_OPTIMIZED_TESTS", "0") == "0":
    flags += quick
os.environ["XLA_FLAGS"] = " ".join(flags)

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every run, and no time limit: the first call of a test compiles.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
