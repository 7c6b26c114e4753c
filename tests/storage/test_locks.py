import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from jax_lora.errors import CheckpointError, ModelError
from jax_lora.storage.locks import LOCK, FolderLock, locked


def test_a_second_writer_is_refused_by_the_name_of_the_first(tmp_path):
    with locked(tmp_path, CheckpointError):
        with pytest.raises(ModelError) as info, locked(tmp_path, ModelError):
            pass
    pattern = rf"process {os.getpid()} on \S+, started \d{{4}}-\d\d-\d\dT\S+: \S+"
    assert re.search(pattern, str(info.value))
    assert str(tmp_path) in str(info.value)


def test_the_file_is_gone_when_the_writer_is_done_or_fails(tmp_path):
    with locked(tmp_path, CheckpointError):
        assert (tmp_path / LOCK).is_file()
    with pytest.raises(KeyError), locked(tmp_path, CheckpointError):
        raise KeyError
    assert not any(tmp_path.iterdir())


def test_threads_exclude_each_other(tmp_path):
    inside, most, refused = [], [], []
    start = threading.Barrier(8)

    def write():
        start.wait()
        for _ in range(50):
            try:
                with locked(tmp_path, CheckpointError):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except CheckpointError:
                refused.append(1)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) + len(refused) == 400
    assert not any(tmp_path.iterdir())


HOLDER = """
import os, sys, time
from pathlib import Path
from jax_lora.errors import LoraError
from jax_lora.storage.locks import FolderLock
lock = FolderLock(Path(sys.argv[1]), LoraError)
if not os.fork():  # the worker says that it runs: its copy of the lock is closed by then
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_a_killed_process_holds_nothing_even_if_its_worker_lives(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        worker = int(child.stdout.readline())
        try:
            with pytest.raises(CheckpointError, match=f"process {child.pid} on"):
                FolderLock(tmp_path, CheckpointError)
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert (tmp_path / LOCK).is_file()  # stale
            with locked(tmp_path, CheckpointError):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)
    assert not (tmp_path / LOCK).exists()


def test_a_copy_of_a_locked_folder_is_not_locked(tmp_path):
    (tmp_path / "one").mkdir()
    with locked(tmp_path / "one", CheckpointError):
        shutil.copytree(tmp_path / "one", tmp_path / "copy")
        with locked(tmp_path / "copy", CheckpointError):
            pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="symbolic link"):
        FolderLock(tmp_path / "run", CheckpointError)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"pid": "\\u001b[2J"}'])
def test_a_description_may_hold_anything(tmp_path, content):
    with locked(tmp_path, CheckpointError):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(CheckpointError, match="a process that is starting"):
            FolderLock(tmp_path, CheckpointError)


def test_a_renamed_folder_stays_locked_and_its_new_namesake_is_another(tmp_path):
    one, moved = tmp_path / "one", tmp_path / "moved"
    one.mkdir()
    with locked(one, CheckpointError) as lock:
        lock.rename_folder(moved)
        one.mkdir()
        lock.exchange(one)
        assert lock.held and not (moved / LOCK).exists()
        with pytest.raises(CheckpointError):
            FolderLock(one, CheckpointError)
    assert not any(one.iterdir())


def test_a_folder_that_is_not_there_is_our_own_error(tmp_path):
    with pytest.raises(CheckpointError, match="No such file or directory"):
        FolderLock(tmp_path / "absent", CheckpointError)
