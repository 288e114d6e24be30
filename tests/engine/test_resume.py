"""Runs that are killed with SIGKILL, at any moment, go on to the bits of a run that was left alone."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"stages.align.steps": 6, "stages.sft.steps": 18, "checkpoint.every": 2, "logging.validate_every": 5}
# Large enough that a checkpoint takes a while to write, and a kill can fall inside.
LARGE = {**STEPS, "model.language.ffn": 40_000, "checkpoint.every": 1, "stages.align.steps": 3, "stages.sft.steps": 5}


@pytest.fixture
def start(train_command):
    """start(args): the real command in a process group of its own."""
    running = []

    def launch(args):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            train_command(args), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        running.append(process)
        return process

    yield launch
    for process in running:
        kill(process)


def kill(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_at_random_moments(tiny_config, tmp_path, train, start, assert_same_run):
    config, whole, killed = tiny_config(STEPS), tmp_path / "whole", tmp_path / "killed"
    train([config, "--folder", whole])
    moments, kills = random.Random(0), 0
    while kills < 4:
        resume = ["--resume"] if list((killed / "checkpoints").glob("step-*[0-9]")) else []
        if not resume and killed.exists():
            # Killed before its first checkpoint: there is nothing to go on from, and the folder is refused.
            subprocess.run(["rm", "-r", killed], check=True)
        process = start([config, "--folder", killed, *resume])
        done_before = lines(killed)
        while lines(killed) < done_before + 2 and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15))
        if process.poll() is not None:
            break
        kill(process)
        kills += 1
    assert kills, "the run ended before the first kill"
    train([config, "--folder", killed, "--resume"])
    assert_same_run(killed, whole)


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tiny_config, tmp_path, train, start, assert_same_run):
    config, whole, killed = tiny_config(LARGE), tmp_path / "whole", tmp_path / "killed"
    train([config, "--folder", whole])
    # Two whole ones first, then a kill in the middle of the third.
    process = start([config, "--folder", killed])
    checkpoints = killed / "checkpoints"
    shards = []
    while not shards and process.poll() is None:
        shards = [s for s in checkpoints.glob("*3.partial/*.safetensors") if s.exists()]
    kill(process)
    partial = checkpoints / "step-00000003.partial"
    assert partial.exists(), "the kill did not fall inside the save"
    assert (checkpoints / "step-00000002").exists()
    train([config, "--folder", killed, "--resume"])
    assert not partial.exists()
    assert_same_run(killed, whole)


@pytest.mark.slow
def test_resume_of_another_architecture(tiny_config, tmp_path, train):
    config, folder = tiny_config(), tmp_path / "run"
    train([config, "--folder", folder])
    done = train([config, "--folder", folder, "--resume", "--model.language.ffn", "96"], check=False)
    assert done.returncode == 1
    assert "another architecture" in done.stderr
    assert "model.language.ffn: 64 in the checkpoint, 96 here" in done.stderr
