"""SIGTERM: the step is finished, a checkpoint saved, and the run ends with 0, or says why it could not save."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smalt.engine.preemption import Preemption

ROOT = Path(__file__).resolve().parents[2]
LONG = {"stages.sft.steps": 4000, "checkpoint.every": 1000, "evaluation.questions": 24}


@pytest.fixture
def start(train_command, tmp_path):
    """start(args, nproc=1, options=()): the real command; what it says goes to tmp_path/said.txt."""
    running = []

    def launch(args, nproc=1, options=()):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (tmp_path / "said.txt").open("w") as said:
            command = train_command(args, nproc, options)
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT))
        return running[-1]

    yield launch
    for process in running:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers
            process.wait()


@pytest.fixture
def said(tmp_path):
    return lambda: (tmp_path / "said.txt").read_text()


def wait(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_single_process_saves_and_exits_with_0_whatever_is_sent_after(tiny_config, tmp_path, start, said):
    run = tmp_path / "run"
    process = start([tiny_config(LONG), "--folder", run])
    wait(process, lambda: steps(run) >= 5)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert process.returncode == 0, said()
    assert checkpoints(run) == [f"step-{steps(run):08d}"]
    assert f"stopped after step {steps(run)}, which is saved; go on with --continue --folder {run}" in said()
    assert "warning: SIGTERM: saving after this step, for which there are 30 s (checkpoint.grace_seconds)" in said()


@pytest.mark.slow
def test_a_process_that_dies_in_native_code_says_where(tiny_config, tmp_path, start, said):
    run = tmp_path / "run"
    process = start([tiny_config(LONG), "--folder", run])
    wait(process, lambda: steps(run) >= 2)
    process.send_signal(signal.SIGSEGV)
    assert process.wait() == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in said()
    assert re.search(r'File ".*engine/train.py", line \d+ in train', said())


EXITS = """
import os, sys
from smalt.engine.train import main
code = main(sys.argv[2:])
open(f"{sys.argv[1]}-{os.environ['RANK']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}", "w").write(str(code))
sys.exit(code)
"""


@pytest.mark.slow
def test_torchrun_is_told_and_the_relaunch_goes_on_to_the_same_bits(tiny_config, tmp_path, train, start, said, assert_same_run):
    config = tiny_config({"stages.sft.steps": 40, "checkpoint.every": 1000, "logging.validate_every": 3})
    whole, run = tmp_path / "whole", tmp_path / "run"
    train([config, "--folder", whole], nproc=2)
    (tmp_path / "exits.py").write_text(EXITS)
    arguments = [config, "--folder", run, "--continue"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    with (tmp_path / "said.txt").open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, tmp_path / "exits.py", tmp_path / "code", *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
    wait(process, lambda: steps(run) >= 5)
    process.terminate()
    process.wait(90)
    # Torchrun has an exit code of its own for SIGTERM.
    assert process.returncode == 1
    assert "SignalException" in said()
    assert {path.name: path.read_text() for path in tmp_path.glob("code-*")} == {"code-0-0": "0", "code-1-0": "0"}
    stopped = steps(run)
    assert 5 <= stopped < 43, "the signal did not fall inside the run"
    assert checkpoints(run) == [f"step-{stopped:08d}"]
    assert not (run / "evaluation.json").exists()
    train(arguments, nproc=2)
    assert_same_run(run, whole)


@pytest.mark.slow
def test_workers_that_outlive_torchrun_save_and_end(tiny_config, tmp_path, start, said):
    run = tmp_path / "run"
    process = start([tiny_config(LONG), "--folder", run], nproc=2)
    wait(process, lambda: steps(run) >= 5)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while f"after step {steps(run)}, which is saved" not in said():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)
    # Every rank looks for itself, and the other can have seen it first.
    assert "torchrun, which started this process, is gone: saving" in said() or "stopped as another rank was asked to" in said()
    assert checkpoints(run) == [f"step-{steps(run):08d}"]


@pytest.mark.slow
def test_one_rank_that_is_told_stops_all_at_the_same_step(tiny_config, tmp_path, start, said):
    run = tmp_path / "run"
    process = start([tiny_config(LONG), "--folder", run], nproc=2)
    wait(process, lambda: steps(run) >= 5)
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    ranks = [int(pid) for pid, parent in map(str.split, listed.splitlines()) if int(parent) == process.pid]
    os.kill(ranks[1], signal.SIGTERM)
    assert process.wait(90) == 0, said()
    assert f"stopped as another rank was asked to after step {steps(run)}, which is saved" in said()
    assert checkpoints(run) == [f"step-{steps(run):08d}"]


SLOW_DISK = """
import sys, time
from smalt.engine import checkpoints
from smalt.engine.train import main
real = checkpoints.save_snapshot
def slow(snapshot, folder, *rest):
    if folder.name != "step-00000003.partial":
        print("slow", flush=True)
        time.sleep(600)
    real(snapshot, folder, *rest)
checkpoints.save_snapshot = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_save_that_cannot_finish_in_time_is_given_up(tiny_config, tmp_path, said):
    run = tmp_path / "run"
    changes = {**LONG, "checkpoint.every": 3, "checkpoint.grace_seconds": 3, "checkpoint.keep": 9}
    with (tmp_path / "said.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_DISK, tiny_config(changes), "--folder", run],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output,
        )  # fmt: skip
    wait(process, lambda: "slow" in said())
    started = time.monotonic()
    process.terminate()
    assert process.wait(60) == 1
    assert 1.5 < time.monotonic() - started
    assert "warning: not at an end in 3 s (checkpoint.grace_seconds); the last checkpoint that was finished is good" in said()
    assert checkpoints(run) == ["step-00000003"]


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_an_evaluation_during_training_is_given_up(nproc, tiny_config, tmp_path, start, said):
    run = tmp_path / "run"
    changes = {**LONG, "evaluation.every": 5, "evaluation.max_tokens": 100, "evaluation.budgets": list(range(60))}
    process = start([tiny_config(changes), "--folder", run], nproc=nproc)
    wait(process, lambda: steps(run) == 4)
    time.sleep(2)
    process.terminate()
    process.wait(60)
    assert process.returncode == (0 if nproc == 1 else 1), said()  # torchrun has a code of its own
    assert "the evaluation after step 5 is given up: the run was asked to end" in said()
    assert "after step 5, which is saved" in said()
    assert checkpoints(run) == ["step-00000005"]


@pytest.mark.slow
def test_the_final_evaluation_ends_at_once_and_is_done_again(tiny_config, tmp_path, start, said, train):
    run = tmp_path / "run"
    config = tiny_config({"evaluation.max_tokens": 100, "evaluation.budgets": list(range(40)), "evaluation.questions": 24})
    process = start([config, "--folder", run])
    wait(process, lambda: steps(run) == 7 and (run / "checkpoints" / "step-00000007").exists())
    time.sleep(1)
    process.terminate()
    assert process.wait(60) == 0, said()
    assert re.search("^warning: asked to end: the last checkpoint is saved, the evaluation is not finished", said(), re.MULTILINE)
    assert not (run / "evaluation.json").exists()
    train([config, "--folder", run, "--continue", "--evaluation.budgets", "4"])
    assert len(json.loads((run / "evaluation.json").read_text())) == 6
    assert steps(run) == 7


@pytest.mark.slow
def test_before_training_a_process_ends_at_once(tmp_path):
    # One of two, whose other does not come.
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    process = subprocess.Popen([sys.executable, "-u", "engine/train.py"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    caught = Path(f"/proc/{process.pid}/status")
    wait(process, lambda: int(re.search(r"SigCgt:\s*(\w+)", caught.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1)
    time.sleep(1)
    process.terminate()
    assert process.wait(20) == 0
    assert "asked to end: training has not begun" in process.stderr.read()


def test_the_handler_of_before_is_back_unless_the_process_was_asked_to_end(capsys):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Preemption() as preemption:
            assert not preemption.asked
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        with Preemption() as preemption:
            preemption.begin(30)
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            while not preemption.asked:
                time.sleep(0.01)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.count("SIGTERM: saving") == 1
