"""Check that the devices of all processes work together: `jax-lora doctor --distributed`."""

from __future__ import annotations

import json
import socket
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_lora.errors import LoraError
from jax_lora.storage import multihost


def device_map() -> list[dict[str, Any]]:
    """List the processes, each with its host and its devices; all processes must call it."""
    devices = [str(device) for device in jax.local_devices()]
    own = {
        "process": jax.process_index(),
        "host": socket.gethostname()[:200],
        "devices": len(devices),
        "kind": jax.local_devices()[0].device_kind[:100],
        "first": devices[0][:100],
        "last": devices[-1][:100],
    }
    if jax.process_count() == 1:
        return [own]
    return [json.loads(text) for text in multihost.gather_texts(json.dumps(own))]


def sum_over_devices() -> int:
    """Add the numbers 1 to N, one on each of the N devices of all processes.

    Raises:
      LoraError: It is not N (N + 1) / 2.
    """
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("device",))
    numbers = np.arange(1, len(devices) + 1, dtype=np.int32)
    own = jax.make_array_from_callback(
        numbers.shape, NamedSharding(mesh, PartitionSpec("device")), lambda index: numbers[index]
    )
    total = int(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(own))
    expected = len(devices) * (len(devices) + 1) // 2
    if total == expected:
        return total
    raise LoraError(
        f"the sum of 1 to {len(devices)} over all devices",
        got=str(total),
        expected=str(expected),
        fix="Check the network between the hosts, and the versions of JAX and the driver.",
    )


def map_lines(processes: list[dict[str, Any]], total: int) -> list[str]:
    """Format the map as a table, with the sum below it."""
    width = max(4, *(len(each["host"]) for each in processes))
    lines = [f"process  {'host':<{width}}  devices"]
    for each in processes:
        ends = each["first"] if each["devices"] == 1 else f"{each['first']} to {each['last']}"
        count = f"{each['devices']} x {each['kind']}"
        lines.append(f"{each['process']:>7}  {each['host']:<{width}}  {count}: {ends}")
    count = sum(each["devices"] for each in processes)
    return [*lines, f"The sum of 1 to {count} over all devices is {total}, as expected."]
