"""Folders on a disk: a killed process leaves its own until the next one comes, and nobody takes that of a live one."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from smalt.parallel import swap

# The file alone, for torch takes seconds to import. It does what it is told when it has a folder with a file.
PROCESS = """
import os, pathlib, runpy, sys
folder = runpy.run_path(sys.argv[1])["swap_folder"](pathlib.Path(sys.argv[2]))
(pathlib.Path(folder.name) / "state").write_bytes(bytes(1000))
print(folder.name, flush=True)
exec(sys.stdin.readline())
"""


@pytest.fixture
def start(tmp_path):
    """start(): a process with a folder, and that folder."""
    processes = []

    def one():
        arguments = [sys.executable, "-c", PROCESS, swap.__file__, str(tmp_path)]
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process, Path(process.stdout.readline().strip())

    yield one
    for process in processes:
        process.kill()
        process.communicate()


def end(process, how):
    if how == "SIGKILL":
        process.kill()
    process.communicate({"os._exit": "os._exit(75)\n", "exit": "\n", "error": "1 / 0\n", "SIGKILL": None}[how])
    return process.returncode


@pytest.mark.parametrize(("how", "code"), [("SIGKILL", -signal.SIGKILL), ("os._exit", 75)])
def test_what_a_killed_process_left_goes_at_the_next_start(how, code, start, tmp_path):
    (live, kept), (killed, left) = start(), start()
    assert end(killed, how) == code
    assert (left / "state").exists(), "it was no kill"
    with swap.swap_folder(tmp_path) as own:
        assert set(tmp_path.iterdir()) == {kept, Path(own)}
    assert (kept / "state").stat().st_size == 1000
    assert end(live, "exit") == 0
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_nothing(start, tmp_path):
    process, _ = start()
    assert end(process, "error") == 1
    assert not list(tmp_path.iterdir())


def test_folders_of_one_process(tmp_path):
    first, second = swap.swap_folder(tmp_path), swap.swap_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {Path(first.name).name, Path(second.name).name}
    first.cleanup()
    second.cleanup()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_has_no_lock_yet_is_not_taken(tmp_path, monkeypatch):
    make, others = swap.TemporaryDirectory, []

    def make_beside_another(**arguments):
        folder = make(**arguments)
        if not others:
            others.append(thread.submit(swap.swap_folder, tmp_path))
            wait(others, timeout=0.5)  # as long as one that does not wait its turn would need
        return folder

    monkeypatch.setattr(swap, "TemporaryDirectory", make_beside_another)
    with ThreadPoolExecutor(1) as thread, swap.swap_folder(tmp_path) as first, others[0].result() as second:
        assert set(tmp_path.iterdir()) == {Path(first), Path(second)}


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / "smalt-data").mkdir()
    (tmp_path / "smalt-swap-list").write_text("a file")
    swap.swap_folder(tmp_path).cleanup()
    assert {path.name for path in tmp_path.iterdir()} == {"smalt-data", "smalt-swap-list"}


def test_where_there_are_no_locks_nothing_is_removed(start, tmp_path, monkeypatch):
    process, left = start()
    end(process, "SIGKILL")

    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(swap.fcntl, "flock", flock)
    with swap.swap_folder(tmp_path) as own:
        assert set(tmp_path.iterdir()) == {left, Path(own)}


def test_a_disk_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        swap.swap_folder(tmp_path / "gone")
