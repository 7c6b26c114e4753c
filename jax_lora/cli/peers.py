"""Connections between the processes of a run: they meet at the start, and notice when one ends.

Process 0 listens at an address, and the others connect to it. Each message is a line of JSON. A
killed process closes its connection, which the others notice at once; JAX alone would let them
wait in a collective operation. A host that loses its power is noticed after `SILENCE` seconds.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jax_lora.errors import ConfigError, format_error

SILENCE = 30  # seconds without a sign of life from another host
GRACE = 1.5  # seconds in which a process ends by itself after an error in another one
_MOST = 4096  # bytes of a message

OnLost = Callable[[int, str], Any]


class Peers:
    """The open connections of a process.

    Args:
      index: The index of this process.
      links: Connections by the index of the process at the other end; process 0 has one to every
        other process, and each of these has one to process 0.
    """

    def __init__(self, index: int, links: dict[int, socket.socket]):
        """Keep the connections."""
        self.index, self._links = index, links
        self._leaving, self._reported = threading.Event(), threading.Event()
        self._watcher: threading.Thread | None = None
        self._closed = False

    def watch(self, on_lost: OnLost) -> None:
        """Start a thread that waits for the end of other processes.

        Args:
          on_lost: Called with the index of a process that has ended, and its error message; the
            message is empty if the process was killed. It must end this process.
        """
        self._watcher = threading.Thread(target=self._watch, args=(on_lost,), daemon=True)
        self._watcher.start()

    def leave(self, problem: str | None = None) -> None:
        """Tell the other processes that this one ends.

        Args:
          problem: The error that ends it, so that the others end too; None: it is done.
        """
        self._leaving.set()
        self._tell({"done": True} if problem is None else self._lost(self.index, problem))

    def close(self) -> None:
        """Close the connections, when all processes are done."""
        self._closed = True
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        if self._watcher is not None:
            self._watcher.join(GRACE + 1)
        for link in self._links.values():
            link.close()

    def await_report(self, seconds: float) -> bool:
        """Wait until the end of another process is reported; tell whether it is."""
        return self._reported.wait(seconds)

    def _tell(self, message: dict[str, Any]) -> None:
        for link in self._links.values():
            with contextlib.suppress(OSError):  # it has ended as well
                _send(link, message)

    @staticmethod
    def _lost(index: int, problem: str) -> dict[str, Any]:
        return {"lost": index, "problem": problem[: _MOST // 8]}

    def _watch(self, on_lost: OnLost) -> None:
        with selectors.DefaultSelector() as selector:
            for index, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    link: Any = key.fileobj
                    message = _receive(link)
                    if message.get("done"):
                        selector.unregister(link)
                    else:
                        self._end(message or self._lost(key.data, ""), on_lost)
                        return

    def _end(self, message: dict[str, Any], on_lost: OnLost) -> None:
        """Report the end of a process, unless this one ends by the same error."""
        if self._closed:
            return
        if self.index == 0:
            self._tell(message)
        problem = str(message.get("problem", ""))
        if problem and self._leaving.wait(GRACE):
            return
        self._reported.set()
        on_lost(int(message.get("lost", 0)), problem)


def listen(host: str, port: int) -> socket.socket:
    """Open the port at which the other processes connect, on all addresses of this host.

    Args:
      host: The address to name in an error.
      port: The port; 0: any.

    Raises:
      ConfigError: The port is in use.
    """
    try:
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"--distributed: port {port} on {host}",
            got=str(error),
            expected="a free port on the host of process 0",
            fix="Choose another port, the same in every process.",
        ) from error


def gather(server: socket.socket, count: int, timeout: float) -> Peers:
    """Wait in process 0 for all other processes, and close `server`, which is from `listen`.

    Raises:
      ConfigError: Some process does not connect, or has another number of processes or an index
        that another process has. All connected processes raise it as well.
    """
    links: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout
    with server:
        while len(links) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                link, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, count)) - set(links))
                got = f"no connection from index {', '.join(map(str, missing[:10]))}"
                raise _refusal(links.values(), f"{got} in {timeout:.0f} s", count) from None
            link.settimeout(5.0)
            hello = _receive(link)
            index, number = hello.get("index"), hello.get("count")
            if not isinstance(index, int) or not isinstance(number, int):
                link.close()  # a stranger
                continue
            if number != count:
                got = f"a process with COUNT {number}, while process 0 has COUNT {count}"
            elif index in links or not 0 < index < count:
                got = f"two processes with INDEX {index}"
            else:
                links[index] = link
                continue
            raise _refusal([*links.values(), link], got, count)
    for link in links.values():
        _send(_kept(link), {"met": True})
    return Peers(0, links)


def connect(hosts: Sequence[str], port: int, count: int, index: int, timeout: float) -> Peers:
    """Connect to process 0, which may start later, at the first of the hosts that answers.

    Raises:
      ConfigError: Process 0 cannot be reached, or refuses the processes.
    """
    deadline, problem = time.monotonic() + timeout, ""
    while True:
        for host in hosts:
            try:
                link = socket.create_connection((host, port), timeout=5.0)
            except OSError as error:
                problem = str(error)
                continue
            with contextlib.suppress(OSError):
                _send(link, {"count": count, "index": index})
            link.settimeout(max(deadline - time.monotonic(), 5.0))
            answer = _receive(link)
            if answer.get("met"):
                return Peers(index, {0: _kept(link)})
            link.close()
            if "error" in answer:
                raise ConfigError(str(answer["error"]))
            problem = "something else than process 0 of a run is listening there"
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    raise ConfigError(
        f"--distributed: process {index} of {count}",
        got=f"{hosts[0]}:{port} cannot be reached in {timeout:.0f} s: {problem}",
        expected="process 0, which listens at this address",
        fix="Start process 0 on that host, use an address that this host can resolve, and open "
        "the port in the firewall.",
    )


def _refusal(links: Any, got: str, count: int) -> ConfigError:
    """Tell the processes that have connected, and return the error for process 0."""
    message = format_error(
        "--distributed",
        got=got,
        expected=f"{count} processes: the same COUNT, and each INDEX from 0 to {count - 1} once",
        fix="Give every process the same HOST:PORT,COUNT and its own INDEX.",
    )
    for link in links:
        with contextlib.suppress(OSError):
            _send(link, {"error": message[: _MOST // 8]})
        link.close()
    return ConfigError(message)


def _kept(link: socket.socket) -> socket.socket:
    """Notice when the other host no longer answers."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("KEEPIDLE", SILENCE // 2), ("KEEPINTVL", SILENCE // 6), ("KEEPCNT", 3)):
        if hasattr(socket, f"TCP_{name}"):  # not on every platform
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
    return link


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


def _receive(link: socket.socket) -> dict[str, Any]:
    """Read a message; an empty one means that the connection has ended, or another sender."""
    text = b""
    with contextlib.suppress(OSError, ValueError):
        while not text.endswith(b"\n") and len(text) < _MOST:
            part = link.recv(1)  # never a byte of the next message
            if not part:
                return {}
            text += part
        message = json.loads(text)
        return message if isinstance(message, dict) else {}
    return {}
