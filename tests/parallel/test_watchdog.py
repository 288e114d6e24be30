"""Real gloo processes that stall, die or differ, and what the watchdog says of them: rank, collective, file and line."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalt.parallel.stalls import Collective, Heart, describe, unfinished
from smalt.parallel.watchdog import FIRST_STEP, GRACE, STALLED, Watchdog, group_timeout

WORKER = Path(__file__).with_name("stalling.py")
SOURCE = WORKER.read_text().splitlines()
SIZE = 3


def at(text, function):
    """The place, as a report names it, of the only line of the worker that holds ``text``."""
    (number,) = [i for i, line in enumerate(SOURCE, 1) if text in line]
    return f"tests/parallel/stalling.py:{number} in {function}"


EXCHANGE = at("dist.all_to_all_single(", "exchange")
GATHER = at("dist.all_gather(", "gather")
SLEEP = at("time.sleep(seconds)", "read_slowly")


class Ranks:
    """The processes of one run. ``wait`` gives exit codes and stderr by rank."""

    def __init__(self, name, report, environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(SIZE)}
        common.pop("TORCHELASTIC_RESTART_COUNT", None)
        self.processes = [
            subprocess.Popen(
                [sys.executable, WORKER, name, report],
                env={**common, **environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(SIZE)
        ]  # fmt: skip

    def wait(self, ranks=range(SIZE)):
        errors = {rank: self.processes[rank].communicate(timeout=150)[1] for rank in ranks}
        return [self.processes[rank].returncode for rank in ranks], errors

    def kill(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def run(tmp_path):
    """run(fault, **environment): start the ranks; they are gone at the end of the test."""
    started = []

    def start(name, **environment):
        started.append(Ranks(name, tmp_path / "run" / "stalls.txt", environment))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()


@pytest.fixture
def report(tmp_path):
    """report(): the text of the one report that was written."""

    def read():
        text = (tmp_path / "run" / "stalls.txt").read_text()
        assert len(re.findall(r"^\d{4}-\d\d-\d\d", text, re.M)) == 1, text
        return text

    return read


def inside(fault, text="self.healthy()"):
    """The place of the first line of a fault that holds ``text``."""
    start = next(i for i, line in enumerate(SOURCE) if f"def {fault}(" in line)
    number = next(i for i, line in enumerate(SOURCE[start:], start + 1) if text in line)
    return f"tests/parallel/stalling.py:{number} in {fault}"


# What ranks 0 and 2 say while rank 1 does not come to the exchange of step 3.
WAITING = f"ranks 0, 2, waiting in all_to_all #3 of cp [0, 1, 2], Float[6]: in step 3 at {EXCHANGE}"


@pytest.mark.slow
def test_a_rank_that_skips_a_collective(run, report):
    codes, _ = run("skips").wait()
    text = report()
    assert codes == [STALLED] * SIZE
    assert f"{WAITING} < {inside('skips', 'exchange(')}" in text
    assert f"rank 1, waiting in all_gather #3 of dp [0, 1, 2], Float[6]: in step 3 at {GATHER} < {inside('skips', 'gather(')}" in text


@pytest.mark.slow
def test_a_rank_that_calls_another_kind(run, report):
    codes, _ = run("differs").wait()
    text = report()
    assert codes == [STALLED] * SIZE
    assert f"{WAITING} < {inside('differs', 'exchange(')}" in text
    assert f"rank 1, waiting in all_gather #3 of cp [0, 1, 2], Float[6]: in step 3 at {GATHER}" in text
    assert "#3 of cp [0, 1, 2] is not the same everywhere: all_to_all on ranks 0, 2, all_gather on rank 1" in text


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False])
def test_a_rank_that_sleeps(run, report, recorded):
    codes, errors = run("sleeps", TORCH_FR_BUFFER_SIZE="2000" if recorded else "0").wait()
    text = report()
    assert codes == [STALLED] * SIZE
    assert f"rank 1, not waiting: in step 3 at {SLEEP} < {inside('sleeps', 'read_slowly(')}" in text
    assert "look first at rank 1" in text
    if recorded:
        assert WAITING in text
        assert "its last of cp [0, 1, 2] is all_to_all #2" in text
    else:
        assert f"ranks 0, 2, waiting in all_to_all_single: in step 3 at {EXCHANGE}" in text
    assert "ends too; it was in step 3" in errors[1]


@pytest.mark.slow
def test_a_rank_that_never_sends(run, report):
    codes, _ = run("receives").wait()
    assert codes == [STALLED] * SIZE
    assert f"ranks 0, 2, waiting in recv: in step 3 at {inside('receives', 'dist.recv(')}" in report()


@pytest.mark.slow
def test_a_rank_that_does_not_come_to_a_sharded_backward(run, report):
    codes, _ = run("sharded").wait()
    text = report()
    assert codes == [STALLED] * SIZE
    # FSDP2 issues it in a hook of the backward pass; gloo has no reduce-scatter of its own and takes a sum.
    assert re.search(r"ranks 0, 2, waiting in \w+ #\d of cp \[0, 1, 2\], Float\[42\]", text), text
    assert f"in step 3 at {inside('sharded', 'loss.backward()')}" in text
    assert f"rank 1, not waiting: in step 3 at {SLEEP} < {inside('sharded', 'read_slowly(')}" in text


@pytest.mark.slow
def test_a_rank_that_freezes_in_a_pause(run, report):
    codes, _ = run("freezes").wait([0, 2])
    text = report()
    assert codes == [STALLED] * 2
    assert "rank 1, silent: its process is dead or frozen" in text
    assert WAITING in text
    assert "look first at rank 1" in text


@pytest.mark.slow
def test_a_rank_that_dies(run, report):
    # gloo notices by itself, and says only that a connection closed.
    codes, errors = run("dies").wait()
    text = report()
    assert codes == [1, -signal.SIGKILL, 1]
    assert re.search(r"rank [02] failed in all_to_all_single: .*", text)
    assert f"in step 3 at {EXCHANGE}" in text
    assert "rank 1, silent: its process is dead or frozen" in text
    assert "look first at rank 1" in text
    assert all(f"rank {rank} failed in all_to_all_single" in errors[rank] for rank in (0, 2))


@pytest.mark.slow
def test_a_rank_that_fails(run, tmp_path):
    # Its connections close when its process is gone; where that takes longer than the limit, the others call it a stall.
    codes, _ = run("raises").wait()
    text = (tmp_path / "run" / "stalls.txt").read_text()
    assert codes[1] == 1
    assert {codes[0], codes[2]} <= {1, STALLED}
    assert f"rank 1, failed with ValueError: bad tile: in step 3 at {inside('raises', 'raise ')}" in text
    assert f"in step 3 at {EXCHANGE}" in text


@pytest.mark.slow
def test_a_rank_that_ends_early(run, report):
    codes, _ = run("ends").wait([0, 2])
    text = report()
    assert codes == [STALLED] * 2
    assert "rank 1, ended: in step 3" in text
    assert WAITING in text


@pytest.mark.slow
def test_slow_work_is_no_stall(run, tmp_path):
    codes, errors = run("slow").wait()
    assert codes == [0] * SIZE, errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_starts_the_group_again(tmp_path, report):
    # The fault is in the first life only; the second takes the run to its end.
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE), "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, *command, WORKER, "sleeps", tmp_path / "run" / "stalls.txt"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is done") == SIZE
    assert WAITING in report()


def entry(number, kind="all_reduce", state="scheduled", backend="nccl", group="1", p2p=False, **values):
    """A line of torch's record."""
    return {
        "profiling_name": f"{backend}:{kind}", "process_group": (group, "mesh_cp"), "collective_seq_id": number, "p2p_seq_id": number,
        "is_p2p": p2p, "retired": False, "state": state, "input_sizes": [[4]], "input_dtypes": ["Float"], **values,
    }  # fmt: skip


def numbers(entries):
    return [(c.kind, c.number) for c in unfinished(entries, {})]


def test_the_oldest_unfinished_of_each_group():
    record = [entry(1, state="completed"), entry(2, state="started"), entry(3), entry(7, group="2", kind="broadcast")]
    assert numbers(record) == [("all_reduce", 2), ("broadcast", 7)]
    # The parts of a coalesced operation are never marked as done by NCCL; what is done after them tells.
    parts = [entry(1, kind="send", p2p=True), entry(1, kind="recv", p2p=True), entry(1, kind="coalesced", state="completed", p2p=True)]
    assert numbers([*parts, entry(5)]) == [("all_reduce", 5)]
    assert numbers(parts[:2]) == [("send", 1)]
    assert numbers([entry(1, retired=True, backend="gloo")]) == []


def test_names_of_groups():
    (named,) = unfinished([entry(4)], {"1": "cp [0, 1]"})
    assert str(named) == "all_reduce #4 of cp [0, 1]"
    assert str(unfinished([entry(4)], {})[0]) == "all_reduce #4 of mesh_cp (1)"


@given(st.sets(st.integers(0, 511), min_size=1), st.integers(0, 511))
def test_every_rank_is_named_once(waiting, culprit):
    stuck = Heart(1, 3, "running", "a.py:1 in f", waiting=[Collective("all_reduce", "dp", 4, "", "b.py:2 in g")])
    hearts = dict.fromkeys(sorted(waiting - {culprit}), stuck) | {culprit: Heart(1, 3, "paused for evaluation", "c.py:3 in h")}
    text = describe({rank: Heart.from_json(h.to_json()) for rank, h in hearts.items()}, set())
    assert f"rank {culprit}, paused for evaluation: in step 3 at c.py:3 in h\n" in text
    assert text.endswith(f"look first at rank {culprit}")
    if len(hearts) > 1:
        (line,) = [part for part in text.splitlines() if "waiting in all_reduce #4 of dp: in step 3 at b.py:2 in g" in part]
        named = set()
        for low, high in re.findall(r"(\d+)(?: to (\d+))?", line.partition(", waiting")[0]):
            named |= set(range(int(low), int(high or low) + 1))
        assert named == waiting - {culprit}


def test_one_process_is_not_watched():
    with Watchdog(0, 1, timedelta(seconds=1), None) as watchdog, watchdog.pause("evaluation"):
        watchdog.beat(1)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]


def test_groups_outlast_the_watchdog():
    for seconds in (1, 300, 3600):
        # A collective that stalls just before the limit of a first step is reported half a limit later.
        latest = 1.6 * FIRST_STEP * seconds + GRACE + 2 * min(seconds / 20, 5)
        assert group_timeout(timedelta(seconds=seconds)).total_seconds() > latest
