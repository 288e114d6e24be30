"""A save holds training up only while it copies; what goes wrong in it is said in the thread that trains."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from smalt.engine.checkpoints import CheckpointWriter, latest_checkpoint, load_tensors
from smalt.parallel import alone

ROOT = Path(__file__).resolve().parents[2]
ALONE = alone(torch.device("cpu"))


@pytest.fixture
def errors():
    """What went wrong, and the thread that heard of it."""
    return []


@pytest.fixture
def writer(tmp_path, errors):
    return CheckpointWriter(tmp_path / "checkpoints", 2, ALONE, lambda text: errors.append((text, threading.current_thread())))


@pytest.fixture
def held(writer):
    """A lock that the writing thread waits for before its next save."""
    lock = threading.Lock()
    lock.acquire()
    writer.thread.submit(lock.acquire)
    yield lock
    if lock.locked():
        lock.release()


def tensors():
    return {"model.a": torch.full((50, 20), 1.0), "model.b": torch.full((7,), 1.0, dtype=torch.bfloat16), "step": torch.tensor(1.0)}


def loaded(folder):
    found = {name: torch.full_like(t, -1) for name, t in tensors().items()}
    load_tensors(latest_checkpoint(folder), found)
    return found


def test_training_goes_on_while_the_save_is_held_up(writer, held, tmp_path):
    trained = tensors()
    writer.save(1, trained, {})
    # Steps of training: none of them may be seen in the checkpoint.
    for _ in range(3):
        for t in trained.values():
            t += 1
        writer.poll()
    assert not list(writer.folder.iterdir())
    held.release()
    writer.wait()
    assert all(torch.equal(t, torch.ones_like(t)) for t in loaded(writer.folder).values())


def test_a_second_save_waits_for_the_first(writer, held):
    trained = tensors()
    writer.save(1, trained, {})
    for t in trained.values():
        t += 1
    second = threading.Thread(target=writer.save, args=(2, trained, {}))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    # Had the second copied already, it would have overwritten what the first still has to write.
    assert all(torch.equal(t, torch.ones_like(t)) for t in writer.snapshot.copies.values())
    held.release()
    second.join()
    writer.wait()
    assert sorted(p.name for p in writer.folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert all(torch.equal(t, 2 * torch.ones_like(t)) for t in loaded(writer.folder).values())


def test_memory_of_the_copies_is_used_again(writer):
    trained = tensors()
    writer.save(1, trained, {})
    where = {name: t.data_ptr() for name, t in writer.snapshot.copies.items()}
    items = writer.snapshot.items
    writer.save(2, {name: t.clone() for name, t in trained.items()}, {})
    assert {name: t.data_ptr() for name, t in writer.snapshot.copies.items()} == where
    assert writer.snapshot.items is items
    # A stage that trains other parts: what is gone is given up, what stays is kept, what is new is saved too.
    stage = {"model.a": trained["model.a"], "step": torch.zeros(2), "new": torch.arange(3)}
    writer.save(3, stage, {})
    writer.wait()
    assert set(writer.snapshot.copies) == set(stage)
    assert writer.snapshot.copies["model.a"].data_ptr() == where["model.a"]
    found = {name: torch.full_like(t, -1) for name, t in stage.items()}
    load_tensors(latest_checkpoint(writer.folder), found)
    assert all(torch.equal(found[name], t) for name, t in stage.items())


@pytest.mark.parametrize("report", ["poll", "save", "wait"])
def test_errors_are_heard_in_the_training_thread(writer, errors, report):
    writer.save(1, tensors(), {})
    writer.wait()
    # No folder can be made where a file is in its way.
    blocked = writer.folder / "step-00000002.partial"
    blocked.write_text("")
    writer.save(2, tensors(), {})
    while not writer.pending.ended.done():
        time.sleep(0.01)
    assert not errors
    {"poll": writer.poll, "save": lambda: writer.save(3, tensors(), {}), "wait": writer.wait}[report]()
    ((text, thread),) = errors
    assert thread is threading.main_thread()
    assert "checkpoint of step 2 could not be written" in text
    assert "FileExistsError" in text
    assert f"the last good one is {writer.folder / 'step-00000001'}" in text
    blocked.unlink()
    writer.save(4, tensors(), {})
    writer.wait()
    assert len(errors) == 1
    assert latest_checkpoint(writer.folder).step == 4


def test_what_a_kill_left_is_cleared(tmp_path):
    for name in ("step-00000003.partial", "step-00000001.old.partial", "step-00000002.damaged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    CheckpointWriter(tmp_path, 2, ALONE, pytest.fail)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002.damaged"]


def test_one_of_the_same_step_is_replaced(writer):
    for value in (1, 2):
        writer.save(5, {name: t * value for name, t in tensors().items()}, {})
    writer.wait()
    assert [p.name for p in writer.folder.iterdir()] == ["step-00000005"]
    assert all(torch.equal(t, 2 * torch.ones_like(t)) for t in loaded(writer.folder).values())


@pytest.fixture
def refuse(monkeypatch):
    """refuse(method of pathlib.Path or shutil, name, error): it fails for paths of that name."""

    def make(of, method, name, number):
        real = getattr(of, method)

        def refusing(path, *rest, **named):
            if Path(path).name == name and not named.get("ignore_errors"):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *rest, **named)

        monkeypatch.setattr(of, method, refusing)

    return make


def test_an_old_one_that_cannot_be_renamed_is_said_once_and_stays(writer, errors, refuse, capfd):
    refuse(Path, "rename", "step-00000001", errno.EACCES)
    for step in range(1, 6):
        writer.save(step, tensors(), {})
    writer.wait()
    assert not errors
    assert sorted(p.name for p in writer.folder.iterdir()) == [f"step-0000000{n}" for n in (1, 4, 5)]
    said = capfd.readouterr().err
    assert said.count("cannot be removed") == 1
    assert f"warning: {writer.folder / 'step-00000001'} cannot be removed: Permission denied" in said


def test_an_old_one_that_cannot_be_emptied_is_no_failed_save(writer, errors, refuse, capfd):
    refuse(shutil, "rmtree", "step-00000001.old.partial", errno.EBUSY)
    for step in range(1, 6):
        writer.save(step, tensors(), {})
    writer.wait()
    assert not errors
    # What the file system allows is removed all the same.
    assert sorted(p.name for p in writer.folder.iterdir()) == ["step-00000004", "step-00000005"]
    assert capfd.readouterr().err.count("step-00000001.old.partial cannot be removed: Device or resource busy") == 1


def test_what_a_kill_left_may_stay(tmp_path, refuse, capfd):
    (tmp_path / "step-00000003.partial").mkdir()
    refuse(shutil, "rmtree", "step-00000003.partial", errno.EBUSY)
    CheckpointWriter(tmp_path, 2, ALONE, pytest.fail)
    assert "step-00000003.partial cannot be removed: Device or resource busy" in capfd.readouterr().err


def test_a_folder_that_cannot_be_listed_is_no_failed_save(writer, errors, monkeypatch, capfd):
    def refuse(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    writer.save(1, tensors(), {})
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr("smalt.engine.checkpoints.os.scandir", refuse)
        writer.save(2, tensors(), {})
        writer.wait()
    assert not errors
    assert "old checkpoints are not removed" in capfd.readouterr().err
    assert latest_checkpoint(writer.folder).step == 2


SAVES = """
import sys, torch
from pathlib import Path
from smalt.engine.checkpoints import CheckpointWriter
from smalt.parallel import alone
def failed(text): raise SystemExit(text)
writer = CheckpointWriter(Path(sys.argv[1]), 2, alone(torch.device("cpu")), failed)
for step in range(int(sys.argv[2]), 10**6):
    writer.save(step, {"model.a": torch.full((300_000,), float(step)), "step": torch.tensor(float(step))}, {})
"""


@pytest.mark.slow
def test_kills_at_any_moment_of_a_save_leave_a_whole_one(tmp_path, capfd):
    # About a hundred saves a second: a kill falls into writing, hashing, the rename or the removal of an old one.
    folder, moments, last, interrupted = tmp_path / "checkpoints", random.Random(0), 0, set()
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES, folder, str(last + 1)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        # A single one is there for a moment only, which a busy machine can miss.
        while not any(path.name >= f"step-{last + 2:08d}" for path in folder.glob("step-*")) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        interrupted |= {p.suffixes[0] for p in folder.glob("*.partial")}
        checkpoint = latest_checkpoint(folder)
        assert checkpoint.step > last
        last = checkpoint.step
        found = {"model.a": torch.zeros(300_000), "step": torch.zeros(())}
        load_tensors(checkpoint, found)
        assert all((t == last).all() for t in found.values())
    assert "damaged" not in capfd.readouterr().err
    assert interrupted, "no kill fell inside a save"


def run_on_three(code, tmp_path):
    """A script on three processes, each of which says "done" at its end; it is given a folder for checkpoints."""
    script = tmp_path / "script.py"
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [*torchrun, script, tmp_path / "checkpoints"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done") == 3
    return done


PROCESSES = """
import sys, time, torch
import torch.distributed as dist
from pathlib import Path
from torch.distributed.tensor import Shard, distribute_tensor
from smalt.engine.checkpoints import CheckpointWriter
from smalt.parallel import join_world, leave_world
world, folder, errors = join_world("cpu"), Path(sys.argv[1]), []
writer = CheckpointWriter(folder, 2, world, errors.append)
whole = torch.arange(28.0).reshape(4, 7)
def tensors(value):
    # Rows of a 4-row tensor: on three processes the last has none.
    rows = distribute_tensor(whole * value, world.meshes.weights, [Shard(0)])
    return {"rows": rows, "same": torch.full((5,), float(value)), f"random_state.{world.rank}": torch.tensor([world.rank])}
def train():
    dist.all_reduce(torch.ones(1))
first = tensors(1)
# The others begin to save after three more steps of training. Till then the save of the first cannot end; its training goes on.
if world.is_main:
    writer.save(1, first, {})
for _ in range(3):
    train()
    writer.poll()
if world.is_main:
    assert writer.pending is not None and not (folder / "step-00000001").exists()
train()
if not world.is_main:
    writer.save(1, first, {})
writer.wait()
assert not errors and (folder / "step-00000001").exists()
# What goes wrong on one process is known on all: a file where the main process must remove a folder.
dist.barrier()
if world.is_main:
    (folder / "step-00000002").write_text("")
dist.barrier()
writer.save(2, tensors(2), {})
writer.wait()
assert len(errors) == 1 and "NotADirectoryError" in errors[0] and "step-00000001" in errors[0], errors
dist.barrier()
writer.save(3, tensors(3), {})
writer.wait()
assert len(errors) == 1, errors
print("done", world.rank, flush=True)
leave_world(world)
"""


@pytest.mark.slow
def test_processes_save_together_fail_together_and_do_not_hold_up_training(tmp_path):
    run_on_three(PROCESSES, tmp_path)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint.step == 3
    assert [p.name for p in sorted(checkpoint.path.glob("*.safetensors"))] == [f"shard-0000{n}.safetensors" for n in range(3)]
    found = {"rows": torch.zeros(4, 7), "same": torch.zeros(5), "random_state.2": torch.zeros(1, dtype=torch.int64)}
    load_tensors(checkpoint, found)
    assert torch.equal(found["rows"], 3 * torch.arange(28.0).reshape(4, 7))
    assert torch.equal(found["same"], torch.full((5,), 3.0))
    assert found["random_state.2"].item() == 2


TOGETHER = """
import random, shutil, sys, time, torch
import torch.distributed as dist
from pathlib import Path
from smalt.engine import checkpoints
from smalt.parallel import join_world, leave_world
world, folder, heard = join_world("cpu"), Path(sys.argv[1]), []
moments, real = random.Random(world.rank), checkpoints.save_snapshot
def slow(*arguments):
    # The processes hear of the end of a save at different moments.
    try:
        real(*arguments)
    finally:
        time.sleep(moments.choice((0, 0.02, 0.2)))
checkpoints.save_snapshot = slow
writer = checkpoints.CheckpointWriter(folder, 1, world, lambda message: heard.append(step))
if world.is_main:
    # Removal fails on this process alone.
    def refused(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))
    shutil.rmtree = refused
step = 0
for number in range(12):
    if world.is_main and number % 3 < 2:
        (folder / f"step-{number:08d}.partial").write_text("")
    dist.barrier()
    writer.save(number, {"model.a": torch.ones(1000)}, {})
    for _ in range(15):
        step += 1
        dist.all_reduce(torch.ones(1))
        time.sleep(moments.choice((0, 0.01, 0.05)))
        writer.poll()
        known = [None] * world.size
        # What the processes have heard till this step, before any of them takes the next.
        dist.all_gather_object(known, list(heard))
        assert all(k == heard for k in known), (world.rank, step, known)
    assert writer.pending.reported, "a save was not reported while steps went on"
writer.wait()
assert len(heard) == 8, heard
print("done", world.rank, heard, flush=True)
leave_world(world)
"""


@pytest.mark.slow
def test_all_processes_report_a_failed_save_in_the_same_step(tmp_path):
    # With checkpoint.on_error = "stop" a process that reports raises: one that did not would wait for it in the next collective.
    done = run_on_three(TOGETHER, tmp_path)
    assert done.stderr.count("step-00000002.old.partial cannot be removed: Device or resource busy") == 1


LOST = """
import sys, time, torch
import torch.distributed as dist
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from smalt.engine import checkpoints, shard_storage
from smalt.parallel import join_world, leave_world
world, folder, heard = join_world("cpu"), Path(sys.argv[1]), []
write, save = shard_storage.write_tensors, checkpoints.save_snapshot
def stall(path, *rest):
    if "step-00000001" in str(path) and world.rank == 1:
        time.sleep(4)
    return write(path, *rest)
def fail(snapshot, partial, *rest):
    if "step-00000003" in str(partial) and world.rank == 2:
        raise MemoryError("no room")
    save(snapshot, partial, *rest)
shard_storage.write_tensors, checkpoints.save_snapshot = stall, fail
# The processes lose each other after two seconds in a save; those of training have time.
writer = checkpoints.CheckpointWriter(folder, 9, replace(world, timeout=timedelta(seconds=2)), heard.append)
def train():
    dist.all_reduce(torch.ones(1))
    writer.poll()
    known = [None] * world.size
    dist.all_gather_object(known, heard)
    assert all(k == heard for k in known), known
for number, failed in ((1, 0), (2, 1), (3, 1), (4, 2)):
    writer.save(number, {"model.a": torch.ones(1000), f"own.{world.rank}": torch.ones(9)}, {})
    for _ in range(5):
        train()
        time.sleep(0.5)
    assert len(heard) == failed, heard
writer.wait()
train()
assert "checkpoint of step 1 could not be written" in heard[0], heard
assert "checkpoint of step 3 could not be written" in heard[1] and ": rank 2: MemoryError: no room" in heard[1], heard
assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000004"], list(folder.iterdir())
print("done", world.rank, heard, flush=True)
leave_world(world)
"""


@pytest.mark.slow
def test_processes_that_lose_each_other_in_a_save_say_so_together_and_save_again(tmp_path):
    run_on_three(LOST, tmp_path)


def test_a_poll_does_not_wait_for_the_removal_of_a_failed_save(writer, errors, monkeypatch):
    removed, may_end = threading.Event(), threading.Event()

    def remove(path, ignore_errors=False):
        removed.set()
        may_end.wait(60)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("smalt.engine.checkpoints.save_snapshot", fail)
    monkeypatch.setattr(shutil, "rmtree", remove)
    writer.save(1, tensors(), {})
    assert removed.wait(60)
    try:
        polls = threading.Thread(target=lambda: [writer.poll() for _ in range(2)], daemon=True)
        polls.start()
        polls.join(10)
        assert not polls.is_alive()
        assert len(errors) == 1
    finally:
        may_end.set()
    writer.wait()
    assert len(errors) == 1
