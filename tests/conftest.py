"""Strict settings for every test: they find whole classes of faults by themselves.

Mixed dtypes do not promote (a bfloat16 model never turns into float32 unseen), ranks do not
broadcast by accident, and eight devices are there on any machine, so that sharding is tested.
"""

import importlib.util
import os
from pathlib import Path

# Read when JAX first looks for devices, so they are set before anything imports it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The command keeps compiled programs, in the user's own folder; tests are not to leave any.
os.environ["JAX_LORA_NO_CACHE"] = "1"
# Most of a test's time is compilation, and many tests compile the same function. JAX's own cache is
# shared by all processes of a run and kept for the next one; `make clean` deletes it. The key of an
# entry is the function itself, so that a change is compiled again. The limit makes JAX lock the
# folder, for which it needs filelock.
if importlib.util.find_spec("filelock"):
    cache = Path(__file__).parents[1] / ".pytest_cache" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every run, and no time limit: the first call of a test compiles.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
