"""The option --distributed: join the processes of a run before JAX starts its devices."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from jax_lora.cli.peers import SILENCE, Peers, connect, gather, listen
from jax_lora.errors import ConfigError, LoraError, format_error
from jax_lora.storage import multihost

AUTO, OFF = "auto", "off"
LOST = 5  # exit code: another process has ended
TIMEOUT = 300  # seconds until all processes must have started
HELP = "join processes: auto, off, or HOST:PORT,COUNT,INDEX with the host of process 0 [off]"
# What `jax.distributed.initialize` recognizes without arguments.
CLUSTERS = "TPU VMs, GKE and Kubernetes jobs, SLURM (srun), Open MPI (mpirun)"

_peers: Peers | None = None


@dataclasses.dataclass(frozen=True)
class Address:
    """The processes of a run: the address of process 0, their number, and the index of this one."""

    host: str
    port: int
    count: int
    index: int


def add_distributed_option(parser: Any, **options: Any) -> None:
    """Add `--distributed`; without it, this process runs alone."""
    metavar = "auto|off|HOST:PORT,COUNT,INDEX"
    parser.add_argument("--distributed", default=OFF, metavar=metavar, help=HELP, **options)


def parse_address(text: str) -> Address | None:
    """Read the value of `--distributed`, "HOST:PORT,COUNT,INDEX"; None for "auto".

    Raises:
      ConfigError: The text has another form, or the index is not below the count.

    Example:
      >>> parse_address("node1:8476,4,0")
      Address(host='node1', port=8476, count=4, index=0)
    """
    if text == AUTO:
        return None
    found = re.fullmatch(r"(\[[^\]]+\]|[^:,\s]+):(\d{1,5}),(\d{1,6}),(\d{1,6})", text.strip())
    if found:
        host, (port, count, index) = found[1].strip("[]"), map(int, found.groups()[1:])
        if 0 < port < 65536 and index < count:
            return Address(host, port, count, index)
    raise ConfigError(
        "--distributed",
        got=repr(text),
        expected="auto, off, or HOST:PORT,COUNT,INDEX with INDEX from 0 to COUNT - 1",
        fix="Type, for example, --distributed node1:8476,2,0 on node1, and "
        "--distributed node1:8476,2,1 on the other host.",
    )


@contextlib.contextmanager
def joined(text: str) -> Iterator[None]:
    """Join the processes of a run; inside the block, JAX sees the devices of all of them.

    An error in one process, or its death, ends all of them. `text` is that of `--distributed`.

    Raises:
      ConfigError: The value is wrong, no cluster is found, or the processes do not meet.
    """
    global _peers
    if text == OFF:
        yield
        return
    _peers = _join(parse_address(text), TIMEOUT)
    try:
        yield
    except BaseException as error:
        # A failed collective operation is the echo of a process that has ended; its name follows.
        # JAX raises it as a JaxRuntimeError or, from an operation at its start, a ValueError.
        if isinstance(error, RuntimeError | ValueError) and not isinstance(error, LoraError):
            _peers.await_report(5.0)
        _peers.leave(f"{error}" or type(error).__name__)
        raise
    _peers.leave()
    jax.distributed.shutdown()  # waits for all processes
    _peers.close()
    _peers = None


def shown_process() -> str:
    """Return "[process 1] " for messages, or an empty string in a process that is alone."""
    return "" if _peers is None else f"[process {_peers.index}] "


def end_process(code: int) -> int:
    """Return the exit code; after an error in one of several processes, exit immediately.

    Otherwise JAX would wait at the exit for processes that have ended.
    """
    return code if _peers is None else _exit(code)


def crash(error: BaseException) -> NoReturn:
    """Print the traceback of an unexpected error in one of several processes, and exit."""
    traceback.print_exception(error)
    _exit(1)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _join(address: Address | None, timeout: float) -> Peers:
    """Start `jax.distributed`, and connect the processes."""
    # A signal must reach the training loop, which saves a checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {
        "heartbeat_timeout_seconds": 3 * SILENCE,
        "initialization_timeout": int(timeout),
    }
    if address is None:
        try:
            jax.distributed.initialize(**options)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(
                "--distributed auto",
                got=f"no cluster: {error}",
                expected=f"one of {CLUSTERS}",
                fix="Give the address by hand in every process: --distributed "
                "HOST:PORT,COUNT,INDEX, for example node1:8476,2,0 and node1:8476,2,1.",
            ) from error
        peers = _meet_by_broadcast(timeout)
    else:
        # The processes meet first, because JAX ends them without an exception if they do not.
        host, port, count, index = dataclasses.astuple(address)
        if index == 0:
            peers = gather(listen(host, port), count, timeout)
        else:
            peers = connect([host], port, count, index, timeout)
        shown = f"[{host}]" if ":" in host else host
        # "deactivate": a scheduler's variables do not change what was given by hand.
        more = {"cluster_detection_method": "deactivate"}
        jax.distributed.initialize(f"{shown}:{port}", count, index, **more, **options)
    peers.watch(_report_lost)
    return peers


def _meet_by_broadcast(timeout: float) -> Peers:
    """Connect the processes at a free port of process 0, whose addresses it broadcasts."""
    count, index = jax.process_count(), jax.process_index()
    server = listen(socket.gethostname(), 0) if index == 0 else None
    port = 0 if server is None else server.getsockname()[1]
    port, *hosts = multihost.first_alone(lambda: [port, *_own_addresses()])
    if server is not None:
        return gather(server, count, timeout)
    return connect(hosts, port, count, index, timeout)


def _own_addresses() -> list[str]:
    """List the addresses of this host: of its route to others, and its names."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; it only chooses the outgoing address
        found.append(probe.getsockname()[0])
    return [*found, socket.getfqdn(), socket.gethostname()]


def _report_lost(index: int, problem: str) -> NoReturn:
    """Print which process has ended, and exit: the main thread may wait for it forever."""
    message = format_error(
        f"process {index}",
        got=f"it ended: {problem}" if problem else "it was killed, or its host failed",
        expected="all processes until the end of the run",
        fix="Start all processes again. A training run continues from its last checkpoint with "
        "--resume, on any number of hosts.",
    )
    print(f"{shown_process()}error: {message}", file=sys.stderr)
    _exit(LOST)
