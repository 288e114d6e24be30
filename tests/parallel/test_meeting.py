"""Processes find each other in a store that still has the keys of dead ones, whatever each torchrun has counted."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from smalt.parallel import meeting
from smalt.parallel.meeting import alive, meet_in_store, wait_for_alive


def meet_all(store, restarts, timeout=timedelta(seconds=20)):
    """What each rank gets: a value that only its own life has, and whether a process had a life before."""

    def one(rank):
        own, restarted = meet_in_store(store.clone(), rank, len(restarts), restarts[rank], timeout)
        own.set(f"value/{rank}", str(restarts))
        return [own.get(f"value/{other}").decode() for other in range(len(restarts))], restarted

    with ThreadPoolExecutor(len(restarts)) as pool:
        return list(pool.map(one, range(len(restarts))))


@pytest.fixture
def store():
    """A store of which every thread takes a connection of its own."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def test_every_life_has_keys_of_its_own(store):
    for restarts in ([0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 0]):
        found = meet_all(store, restarts)
        assert [values for values, _ in found] == [[str(restarts)] * 3] * 3
        assert found[0][1] == (max(restarts) > 0)


@pytest.mark.slow
def test_ranks_that_do_not_come_are_named(store):
    store.set("hello/1", "dead")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(meet_in_store, store.clone(), 2, 4, 0, timedelta(seconds=9))
        with pytest.raises(RuntimeError, match="ranks 1, 3 did not come within 1 s"):
            meet_in_store(store, 0, 4, 0, timedelta(seconds=1))
    with pytest.raises(RuntimeError, match=r"rank 0 did not come within 0\.5 s"):
        meet_in_store(store, 1, 2, 0, timedelta(seconds=0.5))


@pytest.mark.slow
def test_rank_0_is_waited_for_as_long_as_it_lives(store, monkeypatch):
    monkeypatch.setattr(meeting, "SECONDS_BETWEEN_BEATS", 0.1)
    over = []
    with ThreadPoolExecutor(1) as pool:
        with alive(store, "decision"):
            waiting = pool.submit(lambda: (wait_for_alive(store.clone(), "decision", timedelta(seconds=1)), over.copy()))
            time.sleep(2.5)
            over.append(True)
        assert waiting.result(20) == (None, [True])
    with pytest.raises(RuntimeError, match=r"rank 0 has given no sign of life for 0\.5 s; this rank waits for its other decision"):
        wait_for_alive(store, "other decision", timedelta(seconds=0.5))


DECIDES = """
import sys, time
from datetime import timedelta
from smalt.parallel import mesh
mesh.TIMEOUT = timedelta(seconds=5)
world = mesh.meet()
def decide():
    time.sleep(7)
    raise SystemExit("decided")
try:
    world.agree(decide, "launch")
except SystemExit as answer:
    sys.stdout.write(f"{answer}\\n")  # in one write: the two share the pipe
mesh.leave_world(mesh.lay_out(world, "cpu", mesh.ParallelConfig()))
"""


@pytest.mark.slow
def test_a_decision_may_take_longer_than_the_timeout(tmp_path):
    script = tmp_path / "decides.py"
    script.write_text(DECIDES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "decided\n" * 2


WORKER = """
import json, os, signal, sys, time
from smalt.parallel import join_world, leave_world
world = join_world("cpu")
restarted = world.agree(lambda: world.restarted)
if not restarted and world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if not restarted:
    time.sleep(600)  # until its torchrun, which has nothing to complain of, hears that the other one starts again
with open(f"{sys.argv[1]}-{world.rank}.json", "w") as file:
    json.dump([restarted, int(os.environ["TORCHELASTIC_RESTART_COUNT"])], file)
leave_world(world)
"""


@pytest.mark.slow
def test_two_torchruns_of_which_one_loses_a_worker(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "meeting", str(script), str(tmp_path / "found"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=180)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2)]
    assert [restarted for restarted, _ in found] == [True, True]
    assert sorted(count for _, count in found) == [0, 1]  # each torchrun counts the deaths of its own workers
