"""A run on two processes under torchrun that is killed again and again, anywhere, ends with the bits of one that was left alone.

``make soak`` kills it 50 times, the test 5 times (SMALT_SOAK_KILLS). A killed rank is torchrun's to replace; a killed torchrun is
replaced by the same command line.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("SMALT_SOAK_KILLS", "5"))
# Each kind at each moment in turn, in a shuffled order.
KINDS = ("one rank", "all ranks", "torchrun and all ranks", "torchrun alone")
MOMENTS = ("step", "save", "save", "start")
# About four steps are new in each life on a machine with nothing else to do, and the run must not end before the last kill.
# Checkpoints take a while to write, so that a kill can fall inside.
CHANGES = {
    "stages.sft.steps": 7 * KILLS + 10, "checkpoint.every": 2, "model.language.ffn": 20_000, "logging.validate_every": 7,
    "evaluation.budgets": [4], "checkpoint.grace_seconds": 10,
}  # fmt: skip
SECONDS_TO_RECOVER = 240


class Job:
    """The command line of a run, launched as often as it takes; what all its processes say goes to one file."""

    def __init__(self, command, folder, log):
        self.command, self.folder, self.log = command, folder, log
        self.torchrun, self.doomed = None, []

    def launch(self):
        with self.log.open("a") as log:
            self.torchrun = subprocess.Popen(
                self.command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
            )

    def ranks(self):
        """Process ids of the workers, which have sessions of their own: a kill of torchrun's process group passes them by."""
        return [pid for pid, parent in alive().items() if parent == self.torchrun.pid]

    def kill(self, kind, dice):
        """The ranks that it strikes or leaves without a launcher are in ``doomed``."""
        self.doomed = ranks = self.ranks()
        for pid in [dice.choice(ranks)] if kind == "one rank" and ranks else [] if kind == "torchrun alone" else ranks:
            _kill(pid)
        if kind.startswith("torchrun"):
            self.torchrun.kill()
            self.torchrun.wait()
            self.launch()

    def lines(self):
        path = self.folder / "metrics.jsonl"
        return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []

    def wait(self, condition, seconds):
        """Until the condition holds. Fails when the run ends or hangs before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.torchrun.poll() is None, f"torchrun ended with {self.torchrun.returncode}\n{self._said()}"
            assert time.monotonic() < deadline, f"nothing for {seconds} s: {len(self.lines())} steps\n{self._said()}"
            time.sleep(0.005)

    def finish(self, seconds):
        assert self.torchrun.wait(seconds) == 0, self._said()

    def end(self):
        if self.torchrun is not None and self.torchrun.poll() is None:
            ranks = self.ranks()
            self.torchrun.kill()
            self.torchrun.wait()
            for pid in ranks:
                _kill(pid)

    def _said(self):
        return self.log.read_text()[-6000:]


def alive():
    """Parents of all processes by process id, without those that only wait to be reaped."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    return {int(pid): int(parent) for pid, parent, state in map(str.split, listed.splitlines()) if not state.startswith("Z")}


def _kill(pid):
    # It can have died of the one before it.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def partial(folder):
    return next((folder / "checkpoints").glob("step-*[0-9].partial"), None)


@pytest.fixture
def job(train_command, tmp_path):
    """job(args): the run on two processes under a torchrun that restarts them."""
    jobs = []

    def start(args, folder):
        command = train_command([*args, "--folder", folder, "--continue"], nproc=2, options=["--max-restarts", "1000"])
        jobs.append(Job(command, folder, tmp_path / "said.txt"))
        return jobs[-1]

    yield start
    for one in jobs:
        one.end()


@pytest.mark.slow
def test_killed_again_and_again(tiny_config, tmp_path, train, job, assert_same_run):
    config, whole, killed = tiny_config(CHANGES), tmp_path / "whole", tmp_path / "killed"
    train([config, "--folder", whole], nproc=2)
    dice, plan = random.Random(0), []
    while len(plan) < KILLS:
        plan += dice.sample([(kind, moment) for kind in KINDS for moment in MOMENTS], len(KINDS) * len(MOMENTS))
    run, kills = job([config], killed), []
    run.launch()
    for kind, moment in plan[:KILLS]:
        # The last words of those that outlive a kill for a while are not steps of the next life.
        run.wait(lambda: not set(run.doomed) & alive().keys(), 90)
        seen = set(run.lines())
        if moment == "start":
            run.wait(lambda: len(run.ranks()) == 2, SECONDS_TO_RECOVER)
            # Later than Python itself takes: a worker knows its torchrun by looking at its parent first of all.
            time.sleep(dice.uniform(2, 6))
        else:
            run.wait(lambda seen=seen: (lines := run.lines()) and lines[-1] not in seen, SECONDS_TO_RECOVER)
            if kills:
                kills[-1]["recovery"] = time.monotonic() - kills[-1]["at"]
            time.sleep(dice.uniform(0, 0.1))
        if moment == "save":
            run.wait(lambda: partial(killed), SECONDS_TO_RECOVER)
        steps = len(run.lines())
        run.kill(kind, dice)
        kills.append({"at": time.monotonic(), "kind": kind, "moment": moment, "step": steps, "inside": bool(partial(killed))})
        print(f"kill {len(kills)}: {kind}, {moment}, after step {steps}", flush=True)
    run.finish(600)
    report(kills)
    assert len(kills) == KILLS
    assert any(kill["inside"] for kill in kills), "no kill fell inside a save"
    assert_same_run(killed, whole)
    assert json.loads(run.lines()[-1])["step"] == CHANGES["stages.sft.steps"] + 3


def report(kills):
    groups = defaultdict(list)
    for kill in kills:
        groups[kill["kind"]].append(kill)
    heads = "".join(f"{head:>13}" for head in ("kills", "at the start", "in a step", "in a save"))
    print(f"\n{'killed':22}{heads}  seconds to the next step: least, mean, most")
    for kind, members in groups.items():
        took = [kill["recovery"] for kill in members if "recovery" in kill]
        spread = f"{min(took):.1f}, {sum(took) / len(took):.1f}, {max(took):.1f}" if took else "killed again before"
        start = sum(kill["moment"] == "start" for kill in members)
        inside = sum(kill["inside"] and kill["moment"] != "start" for kill in members)
        print(f"{kind:22}{len(members):13}{start:13}{len(members) - start - inside:13}{inside:13}  {spread}")
