"""The XLA flags of the tests, for processes that they start with another number of devices."""

import os


def for_devices(count: int) -> str:
    """Return the flags of this process for `count` devices: of a flag twice, the last counts."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
