"""The option --distributed: its value, and how processes meet and notice that one has ended."""

import socket
import threading

import jax
import pytest

from jax_lora.cli import distributed, main
from jax_lora.cli.device_map import device_map, map_lines, sum_over_devices
from jax_lora.cli.distributed import Address, parse_address
from jax_lora.cli.peers import connect, gather, listen
from jax_lora.errors import ConfigError


def test_an_address_names_the_first_process_the_count_and_the_index():
    assert parse_address("node1:8476,4,3") == Address("node1", 8476, 4, 3)
    assert parse_address("[::1]:80,1,0") == Address("::1", 80, 1, 0)
    assert parse_address("auto") is None


@pytest.mark.parametrize(
    "text", ["node1:8476", "node1,2,0", "node1:8476,2,2", "node1:99999,2,0", "on", "", "a:1,2,x"]
)
def test_another_value_is_refused_before_anything_is_loaded(text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--distributed", text]) == 2
    message = capsys.readouterr().err
    assert repr(text) in message and "--distributed node1:8476,2,0 on node1" in message
    assert not list(tmp_path.iterdir())


def test_auto_without_a_cluster_says_what_it_looks_for_and_what_to_type(monkeypatch, capsys):
    def initialize(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    before = jax.config.jax_enable_preemption_service
    try:
        assert main(["doctor", "--distributed"]) == 2
    finally:
        jax.config.update("jax_enable_preemption_service", before)
    message = capsys.readouterr().err
    assert "TPU VMs, GKE and Kubernetes jobs, SLURM (srun), Open MPI" in message
    assert "--distributed HOST:PORT,COUNT,INDEX" in message
    assert distributed.shown_process() == ""


def test_the_sum_over_the_devices_of_one_process_is_as_expected():
    count = jax.device_count()
    total = sum_over_devices()
    assert total == count * (count + 1) // 2
    lines = map_lines(device_map(), total)
    assert f"{count} x cpu" in lines[1] and str(total) in lines[-1]


# -----------------------------------------------------------------------------------------------
# Meeting
# -----------------------------------------------------------------------------------------------


def meet(count, others, timeout=5.0):
    """Let processes meet as threads; return what each of them got, or its error."""
    server = listen("localhost", 0)
    port, results = server.getsockname()[1], {}

    def run(name, act, *arguments):
        try:
            results[name] = act(*arguments)
        except ConfigError as error:
            results[name] = str(error)

    calls = [(0, gather, server, count, timeout)]
    for name, (number, index) in enumerate(others, start=1):
        calls.append((name, connect, ["localhost"], port, number, index, timeout))
    threads = [threading.Thread(target=run, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [results[name] for name in sorted(results)]


def test_all_processes_meet_in_any_order():
    found = meet(3, [(3, 2), (3, 1)])
    assert [peers.index for peers in found] == [0, 2, 1]
    for peers in found:
        peers.close()


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([(4, 1)], "a process with COUNT 4, while process 0 has COUNT 2"),
        ([(2, 0)], "two processes with INDEX 0"),
    ],
)
def test_processes_that_do_not_fit_together_are_all_refused(others, says):
    for message in meet(2, others):
        assert says in message and "the same HOST:PORT,COUNT" in message


def test_a_missing_process_is_named():
    first, second = meet(3, [(3, 1)], timeout=0.5)
    assert "no connection from index 2 in 0 s" in first and "index 2" in second


def test_an_address_where_nobody_listens_is_named():
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"localhost:{port} cannot be reached in 0 s"):
        connect(["localhost"], port, 2, 1, 0.1)


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as taken:
        with pytest.raises(ConfigError, match="a free port on the host of process 0"):
            listen("localhost", taken.getsockname()[1])


def test_a_stranger_at_the_port_is_ignored():
    server = listen("localhost", 0)
    port = server.getsockname()[1]
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n")
        found = []
        other = threading.Thread(
            target=lambda: found.append(connect(["localhost"], port, 2, 1, 5.0))
        )
        other.start()
        found.append(gather(server, 2, 5.0))
        other.join(5)
    assert sorted(peers.index for peers in found) == [0, 1]
    for peers in found:
        peers.close()


# -----------------------------------------------------------------------------------------------
# An end
# -----------------------------------------------------------------------------------------------


@pytest.fixture
def three():
    """Three processes that have met, with the ends that each of them reports."""
    found = {peers.index: peers for peers in meet(3, [(3, 1), (3, 2)])}
    reports = {index: [] for index in found}
    reported = {index: threading.Event() for index in found}
    for index, peers in found.items():

        def lost(*report, index=index):
            reports[index].append(report)
            reported[index].set()

        peers.watch(lost)
    yield found, reports, reported
    for peers in found.values():
        peers.close()


@pytest.mark.parametrize("dies", [0, 2])
def test_all_others_learn_which_process_was_killed(three, dies):
    found, reports, reported = three
    found[dies].close()  # as the system does for a killed process
    for index in {0, 1, 2} - {dies}:
        assert reported[index].wait(5)
        assert reports[index] == [(dies, "")]


def test_all_others_learn_the_error_that_ended_a_process(three, monkeypatch):
    monkeypatch.setattr("jax_lora.cli.peers.GRACE", 0.05)
    found, reports, reported = three
    found[1].leave("no such file")
    assert reported[0].wait(5) and reported[2].wait(5)
    assert reports[0] == reports[2] == [(1, "no such file")]


def test_nobody_reports_a_process_that_is_done(three):
    found, reports, _ = three
    for index in (1, 0, 2):
        found[index].leave()
    found[1].close()
    assert not found[0].await_report(0.2)
    assert not any(reports.values())


@pytest.mark.parametrize(
    "error, waits",
    [
        (jax.errors.JaxRuntimeError("Gloo all-reduce failed"), True),
        (ValueError("UNKNOWN: Gloo all-reduce failed"), True),  # from an operation at its start
        (ConfigError("rank: got 0"), False),
    ],
)
def test_a_failed_collective_waits_for_the_name_of_the_process_that_ended(
    error, waits, monkeypatch
):
    class Recorded:
        waited, problem = False, None

        def await_report(self, seconds):
            self.waited = True

        def leave(self, problem):
            self.problem = problem

    peers = Recorded()
    monkeypatch.setattr(distributed, "_peers", None)
    monkeypatch.setattr(distributed, "_join", lambda address, timeout: peers)
    with pytest.raises(type(error)), distributed.joined("node1:8476,2,0"):
        raise error
    assert (peers.waited, peers.problem) == (waits, str(error))
