"""Strict settings for every test: they find whole classes of faults by themselves.

Mixed dtypes do not promote (a bfloat16 model never turns into float32 unseen), ranks do not
broadcast by accident, and eight devices are there on any machine, so that sharding is tested.
"""

import os

# Read when JAX first looks for devices, so they are set before anything imports it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The command keeps compiled programs, in the user's own folder; tests are not to leave any.
os.environ["JAX_LORA_NO_CACHE"] = "1"
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
